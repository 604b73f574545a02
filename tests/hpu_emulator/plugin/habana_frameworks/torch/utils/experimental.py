"""The generation of the emulated Gaudi, which HPU_EMULATOR_DEVICE names."""

import enum
import os


class synDeviceType(enum.Enum):
    synDeviceGaudi = 1
    synDeviceGaudi2 = 4
    synDeviceGaudi3 = 5


def _get_device_type():
    return synDeviceType["synDevice" + os.environ.get("HPU_EMULATOR_DEVICE", "Gaudi2")]


def _is_fp16_supported():
    return _get_device_type() != synDeviceType.synDeviceGaudi
