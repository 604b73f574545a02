// An `hpu` device for torch over host memory: what a Gaudi and its plugin do, as far as a program can tell, and
// counted.
//
//   Memory      an allocator that counts and fills fresh memory with NaN; pinned host memory; a guard for autograd
//   Log         the trace, the counters, and the copies that the host has not waited for yet
//   Operators   storage and copies by hand, all others boxed: on a CPU tensor that shares the memory of the hpu tensor
//   Autocast    boxed too, by lists of names
//   For Python  torch.ops.hpu_emulator.*
//
// The "real" plugin in the comments is the Intel Gaudi bridge, habana-torch-plugin.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using Names = std::unordered_set<std::string>;

const Device hpu(DeviceType::HPU, 0);

std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

// One device, or none.
const auto devices = static_cast<DeviceIndex>(std::stoi(environment("HPU_EMULATOR_DEVICES", "1")));

std::recursive_mutex mutex;  // autograd runs on a thread of its own

struct Memory {
  int64_t limit = std::stoll(environment("HPU_EMULATOR_MEMORY", "103079215104"));
  int64_t live = 0, peak = 0, allocations = 0, frees = 0, largest = 0;

  void take(int64_t bytes) {
    std::lock_guard lock(mutex);
    TORCH_CHECK(devices > 0, "synapse: no device found");
    TORCH_CHECK(live + bytes <= limit, "Allocation failed for size::", bytes, " (", bytes >> 20, ")MB");
    live += bytes, allocations++;
    peak = std::max(peak, live), largest = std::max(largest, bytes);
  }
  void give_back(int64_t bytes) {
    std::lock_guard lock(mutex);
    live -= bytes, frees++;
  }
} memory;

// Device memory: host memory, which may be that of a CPU tensor that an operator returned.
struct Block {
  c10::DataPtr host;
  int64_t bytes;
  Block(c10::DataPtr host, int64_t bytes) : host(std::move(host)), bytes(bytes) {}
  ~Block();
};

c10::DataPtr device_pointer(c10::DataPtr host, int64_t bytes) {
  memory.take(bytes);
  void* data = host.get();
  return {data, new Block(std::move(host), bytes), [](void* block) { delete static_cast<Block*>(block); }, hpu};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto host = c10::GetCPUAllocator()->allocate(bytes);
    if (bytes) std::memset(host.get(), 0xff, bytes);  // NaN in every float type
    return device_pointer(std::move(host), bytes);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} device_allocator;

REGISTER_ALLOCATOR(DeviceType::HPU, &device_allocator);

struct PinnedAllocator final : c10::Allocator {
  static inline std::map<const char*, size_t> blocks;

  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(environment("HPU_EMULATOR_PINNING", "1") != "0", "there is no allocator of pinned memory for hpu");
    auto host = c10::GetCPUAllocator()->allocate(std::max<size_t>(bytes, 1));
    void* data = host.get();
    std::lock_guard lock(mutex);
    blocks[static_cast<char*>(data)] = bytes;
    return {data, new c10::DataPtr(std::move(host)), release, DeviceType::CPU};
  }
  static void release(void* context) {
    auto host = static_cast<c10::DataPtr*>(context);
    std::lock_guard lock(mutex);
    blocks.erase(static_cast<char*>(host->get()));
    delete host;
  }
  static bool owns(const void* pointer) {
    std::lock_guard lock(mutex);
    return blocks.count(static_cast<const char*>(pointer));  // the plugin knows pinned memory by its first byte alone
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} pinned_allocator;

// The generator of the device. Its numbers are not those of the CPU's.
at::Generator& generator() {
  static at::Generator instance = at::make_generator<at::CPUGeneratorImpl>(uint64_t{0x4a0d1});
  return instance;
}

// Which of these are virtual depends on the release of torch: so there is no `override`.
struct HPUHooks : at::HPUHooksInterface {  // torch looks the class up by this name
  explicit HPUHooks(at::HPUHooksArgs) {}
  void init() const {}
  bool hasHPU() const { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return devices > 0; }
  bool hasPrimaryContext(DeviceIndex) const { return true; }
  DeviceIndex deviceCount() const { return devices; }
  DeviceIndex getCurrentDevice() const { return 0; }
  void setCurrentDevice(DeviceIndex index) const { TORCH_CHECK(index == 0, "a process has one HPU, hpu:0"); }
  DeviceIndex exchangeDevice(DeviceIndex) const { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const { return 0; }
  bool isPinnedPtr(const void* pointer) const { return PinnedAllocator::owns(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const { return &pinned_allocator; }
  Device getDeviceFromPtr(void*) const { return hpu; }
  const at::Generator& getDefaultGenerator(DeviceIndex = -1) const { return generator(); }
  at::Generator getNewGenerator(DeviceIndex = -1) const { return at::make_generator<at::CPUGeneratorImpl>(); }
};

}  // namespace

namespace at {
C10_REGISTER_CLASS(HPUHooksRegistry, HPUHooks, HPUHooks)
}  // namespace at

// A build of torch with CUDA takes CUDA for the one accelerator there is, even on a machine without a GPU. So the hooks
// of such a build become those of a build without CUDA.
const auto* no_cuda =
    new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) at::CUDAHooksInterface;  // neither has data

namespace {

// One device, one stream, in order. Events exist because autograd asks for them; they mark nothing.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Stream = c10::Stream;
  DeviceType type() const { return DeviceType::HPU; }
  Device exchangeDevice(Device) const { return hpu; }
  Device getDevice() const { return hpu; }
  void setDevice(Device) const {}
  void uncheckedSetDevice(Device) const noexcept {}
  Stream getStream(Device) const noexcept { return Stream(Stream::DEFAULT, hpu); }
  Stream getDefaultStream(Device) const { return Stream(Stream::DEFAULT, hpu); }
  Stream getStreamFromGlobalPool(Device, bool = false) const { return Stream(Stream::DEFAULT, hpu); }
  Stream getNewStream(Device, int = 0) const { return Stream(Stream::DEFAULT, hpu); }
  Stream exchangeStream(Stream) const noexcept { return Stream(Stream::DEFAULT, hpu); }
  DeviceIndex deviceCount() const noexcept { return devices; }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const {
    *event = const_cast<Guard*>(this);  // no null pointer, which would say "never recorded"
  }
  void block(void*, const Stream&) const {}
  bool queryEvent(void*) const { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept {}
  bool queryStream(const Stream&) const { return true; }
  void synchronizeStream(const Stream&) const {}
  void synchronizeEvent(void*) const {}
  void synchronizeDevice(const DeviceIndex) const {}
};

C10_REGISTER_GUARD_IMPL(HPU, Guard)

// A CPU tensor of the same memory. `storage` is the CPU's view of the storage of `tensor`.
Tensor on_host(const Tensor& tensor, c10::Storage storage) {
  auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                       tensor.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return host;
}

c10::Storage host_storage(const c10::Storage& storage, bool keep_alive) {
  void* data = storage.mutable_data();
  c10::DataPtr pointer(data, Device(DeviceType::CPU));
  if (keep_alive)
    pointer = {data, new c10::Storage(storage), [](void* kept) { delete static_cast<c10::Storage*>(kept); },
               DeviceType::CPU};
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), c10::GetCPUAllocator(),
                      /*resizable=*/true);
}

Tensor on_host(const Tensor& tensor, bool keep_alive = false) {
  return on_host(tensor, host_storage(tensor.storage(), keep_alive));
}

// The hpu tensor that takes over the memory of a CPU tensor.
Tensor on_device(const Tensor& host, const c10::Storage& storage) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage),
                                                         c10::DispatchKeySet(c10::DispatchKey::HPU), host.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  return tensor;
}

c10::Storage device_storage(const c10::Storage& host) {
  auto bytes = static_cast<int64_t>(host.nbytes());
  c10::DataPtr kept(
      host.mutable_data(), new c10::Storage(host), [](void* storage) { delete static_cast<c10::Storage*>(storage); },
      DeviceType::CPU);
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, device_pointer(std::move(kept), bytes), &device_allocator,
                      /*resizable=*/true);
}

// ---------------------------------------------------------------------------------------------------------------------
// Log
// ---------------------------------------------------------------------------------------------------------------------

bool lazy = false;  // set by the plugin

// A fourth of the plugin's, which takes one per queue of the device.
const int64_t most_events = std::stoll(environment("HPU_EMULATOR_EVENTS", "250000"));

struct Copy {
  Tensor from, to, snapshot;  // a snapshot: done already, but `from` must stay as it is until the host has waited
  int64_t number;
};

struct Log {
  bool tracing = false;
  bool capturing = false, replaying = false;  // a graph, whose replay is one piece of work
  std::vector<std::string> records, cpu_fallbacks;
  int64_t d2h_syncs = 0, d2h_copies = 0, d2h_bytes = 0, h2d_copies = 0, h2d_bytes = 0, h2d_blocking_copies = 0;
  int64_t synchronizations = 0, mark_steps = 0, compilations = 0;
  int64_t events = 0, live_events = 0, drains = 0;
  int64_t h2d_waits = 0, locking_waits = 0;
  int64_t last_event = 0, event_before = 0;           // the pieces of work issued before each
  std::unordered_map<const void*, int64_t> last_use;  // of each storage on the device: the last work on it
  int64_t issued = 0, completed = 0;                  // pieces of work; those that the host knows to be done
  std::string copies = environment("HPU_EMULATOR_COPIES", "now");
  std::vector<Copy> pending;
  std::unordered_set<size_t> recipes;
  size_t graph = 0;

  // One piece of work: what was done, the tensors it read and wrote, all else that it was told.
  void record(const std::string& op, const std::vector<Tensor>& tensors, const std::string& constants, bool compiled) {
    std::ostringstream signature, addresses;
    signature << '"' << op << "\", [";
    for (size_t i = 0; i < tensors.size(); i++) {
      auto& t = tensors[i];
      signature << (i ? ", " : "") << "[\"" << (t.is_hpu() ? "hpu" : "cpu") << "\", \"" << t.scalar_type() << "\", "
                << t.sizes() << "]";
      addresses << (i ? ", " : "") << reinterpret_cast<uintptr_t>(t.data_ptr());
    }
    signature << ']';
    std::lock_guard lock(mutex);
    if (replaying) return;
    issued++;
    for (auto& tensor : tensors)
      if (tensor.is_hpu()) last_use[tensor.storage().data()] = issued;
    if (tracing) records.push_back('[' + signature.str() + ", [" + addresses.str() + "], \"" + constants + "\"]");
    if (!compiled) return;
    // Lazy mode bakes constants into the graph that it compiles; eager mode compiles operator by operator.
    auto recipe = std::hash<std::string>()(lazy ? signature.str() + constants : signature.str());
    if (lazy) graph = graph * 1000003 + recipe;
    else compilations += recipes.insert(recipe).second;
  }
  int64_t last_use_of(const Tensor& tensor) const {
    std::lock_guard lock(mutex);
    auto found = last_use.find(tensor.storage().data());
    return tensor.is_hpu() && found != last_use.end() ? found->second : 0;
  }
  void refuse_in_capture(const std::string& what) const {
    TORCH_CHECK(!capturing, what, " is not supported during hpu graph capturing");
  }
  void end_graph() {
    if (graph) compilations += recipes.insert(graph).second;
    graph = 0;
  }
  // In eager mode, the host waits until the threads of its pipeline have issued all work.
  void drain() { drains += !lazy; }
  // A graph that ends without a call of mark_step.
  void imply_mark(const std::string& cause) {
    refuse_in_capture("a mark of a step, by " + cause + ",");
    mark_steps++;
    mark("mark: " + cause);
    end_graph();
  }
  void mark(const std::string& name) {
    std::lock_guard lock(mutex);
    if (tracing) records.push_back("[\"" + name + "\", [], [], \"\"]");
  }

  // Late copies take place before the next work that could see them.
  void run_late_copies() {
    std::lock_guard lock(mutex);
    std::vector<Copy> kept;
    for (auto& copy : pending)
      if (copy.snapshot.defined()) kept.push_back(copy);
      else copy.to.copy_(copy.from);
    pending = std::move(kept);
  }
  // The host has waited for the first `number` pieces of work.
  void complete(int64_t number) {
    std::lock_guard lock(mutex);
    run_late_copies();
    completed = std::max(completed, number);
    bool intact = true;
    std::vector<Copy> kept;
    for (auto& copy : pending)
      if (copy.number > completed) kept.push_back(copy);
      else intact = intact && std::memcmp(copy.from.data_ptr(), copy.snapshot.data_ptr(), copy.from.nbytes()) == 0;
    pending = std::move(kept);
    TORCH_CHECK(intact, "a pinned buffer was overwritten while a non_blocking copy might still have read it");
  }
  void sync(const std::string& cause) {
    refuse_in_capture("waiting for the result of " + cause);
    std::lock_guard lock(mutex);
    d2h_syncs++;
    mark("sync: " + cause);
    end_graph();
    complete(issued);
  }
} log_;

Block::~Block() {
  std::lock_guard lock(mutex);
  log_.last_use.erase(host.get());
  memory.give_back(bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Operators
// ---------------------------------------------------------------------------------------------------------------------

const std::string device_type = environment("HPU_EMULATOR_DEVICE", "Gaudi2");
const bool no_placement_on_cpu = environment("PT_HPU_PLACE_ON_CPU", "") == "none";

// False for what gaudi-pytorch-bridge has no kernel for, and for scatter_add_, whose lazy kernel, its source says, is
// wrong at random. Structured operators arrive as their out= variant, under the same name.
bool is_native(const c10::OperatorHandle& op, at::ArrayRef<IValue> arguments) {
  static const Names never = {"aten::_embedding_bag",
                              "aten::_embedding_bag_forward_only",
                              "aten::_embedding_bag_backward",
                              "aten::_embedding_bag_dense_backward",
                              "aten::_embedding_bag_per_sample_weights_backward",
                              "aten::segment_reduce",
                              "aten::_segment_reduce_backward",
                              "aten::scatter_add_"};
  auto& name = op.schema().name();
  if (name.rfind("aten::", 0) != 0 || never.count(name) || name.rfind("aten::_fused_", 0) == 0) return false;
  if (name == "aten::index_add" || name == "aten::index_add_") return lazy;
  if (name == "aten::embedding") return !arguments[3].toBool() && !arguments[4].toBool();  // scale_grad_by_freq, sparse
  if (name == "aten::embedding_dense_backward") return !arguments[4].toBool();             // scale_grad_by_freq
  if (name == "aten::index_put" || name == "aten::index_put_" || name == "aten::_index_put_impl_")
    for (const IValue& index : arguments[1].toListRef())
      if (index.isNone() || !index.toTensor().defined()) return false;  // "None is not yet supported"
  // Gaudi 3 has no sum over all dimensions whose result is int64, which is that of bools and integers by default.
  if (name == "aten::sum" && op.schema().arguments().size() == 2 && device_type == "Gaudi3") {
    auto dtype = arguments[0].toTensor().scalar_type();
    if (!arguments[1].isNone()) dtype = arguments[1].toScalarType();
    else if (c10::isIntegralType(dtype, true)) dtype = at::kLong;
    return dtype != at::kLong;
  }
  if (name == "aten::sort" || name == "aten::argsort")
    return !c10::isIntegralType(arguments[0].toTensor().scalar_type(), true) ||
           arguments[0].toTensor().scalar_type() == at::kShort;
  return true;
}

// Operators with a result whose size only the device knows, so the host waits for it.
bool waits(const c10::OperatorHandle& op, at::ArrayRef<IValue> arguments) {
  static const Names always = {
      "aten::nonzero",       "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
      "aten::masked_select", "aten::bincount"};
  auto& name = op.schema().name();
  if (always.count(name)) return true;
  if (name == "aten::repeat_interleave" && arguments.size() == 2) return arguments[1].isNone();  // output_size
  if (name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
      name == "aten::_index_put_impl_")
    for (const IValue& index : arguments[1].toListRef())
      if (index.isTensor() &&
          (index.toTensor().scalar_type() == at::kBool || index.toTensor().scalar_type() == at::kByte))
        return true;
  return false;
}

// Calls `visit(tensor)` on each defined tensor of an argument or result; what it returns takes the tensor's place.
template <typename Visit>
void replace_tensors(IValue& value, const Visit& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = visit(value.toTensor());
  } else if (value.isTensorList()) {
    auto old = value.toTensorVector();
    for (auto& tensor : old) tensor = visit(tensor);
    value = old;
  } else if (value.isOptionalTensorList()) {
    auto list = value.toOptionalTensorList();
    c10::List<std::optional<Tensor>> replaced;
    for (std::optional<Tensor> tensor : list)
      replaced.push_back(tensor && tensor->defined() ? std::optional<Tensor>(visit(*tensor)) : tensor);
    value = replaced;
  }
}

void describe_constant(std::ostream& out, const IValue& value) {
  if (value.isInt() || value.isDouble() || value.isBool() || value.isIntList() || value.isDoubleList() ||
      value.isBoolList())
    out << value << ' ';
  else if (value.isNone()) out << "- ";
}

// index_add_ of lazy mode: select, add, scatter. Of rows that occur twice, one update is lost.
void lossy_index_add(c10::Stack* stack, at::ArrayRef<IValue> arguments) {
  auto self = arguments[0].toTensor(), index = arguments[2].toTensor(), source = arguments[3].toTensor();
  auto out = arguments[5].toTensor();
  int64_t dim = arguments[1].toInt();
  auto updated = self.index_select(dim, index) + source * arguments[4].toScalar();
  out.copy_(self).index_copy_(dim, index.to(at::kLong), updated);
  torch::jit::drop(*stack, 6);
  torch::jit::push(*stack, out);
}

void run_on_host_memory(const c10::OperatorHandle& op, c10::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
  auto& schema = op.schema();
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  log_.run_late_copies();

  std::string name = schema.name();
  bool native = is_native(op, arguments), host_waits = waits(op, arguments) || !native;
  if (!native) {
    TORCH_CHECK(!no_placement_on_cpu, name, " is not yet supported on HPU.");
    log_.refuse_in_capture("cpu fallback, of " + name + ",");
    std::lock_guard lock(mutex);
    log_.cpu_fallbacks.push_back(name);
  }
  bool lossy = lazy && name == "aten::index_add" && arguments.size() == 6 &&
               arguments[2].toTensor().numel() <= arguments[0].toTensor().size(arguments[1].toInt());

  std::vector<Tensor> traced;
  std::ostringstream constants;
  std::unordered_map<c10::StorageImpl*, c10::Storage> host_of, device_of;  // storages
  std::vector<std::pair<Tensor, Tensor>> arguments_on;                     // device, host
  auto to_host = [&](const Tensor& tensor) {
    if (!tensor.is_hpu()) {
      TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 0, "Expected all tensors to be on the same device, but found at ",
                  "least two devices, hpu:0 and ", tensor.device(), "! (", name, ")");
      if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
        constants << tensor.item() << ' ';
      } else {  // read by the host, then sent along
        log_.refuse_in_capture("a tensor on the host, in " + name + ",");
        traced.push_back(tensor);
        std::lock_guard lock(mutex);
        log_.h2d_copies++, log_.h2d_blocking_copies++, log_.h2d_bytes += tensor.nbytes();
      }
      return tensor;
    }
    traced.push_back(tensor);
    auto key = tensor.storage().unsafeGetStorageImpl();
    if (!host_of.count(key)) {
      host_of[key] = host_storage(tensor.storage(), false);
      device_of[host_of[key].unsafeGetStorageImpl()] = tensor.storage();
    }
    for (auto& [device, host] : arguments_on)
      if (device.is_same(tensor)) return host;
    arguments_on.emplace_back(tensor, on_host(tensor, host_of[key]));
    return arguments_on.back().second;
  };
  for (size_t i = 0; i < arguments.size(); i++) {
    IValue& argument = torch::jit::peek(*stack, i, schema.arguments().size());
    replace_tensors(argument, to_host);
    describe_constant(constants, argument);
    if (argument.isDevice()) argument = Device(DeviceType::CPU);
    auto optional = schema.arguments()[i].type()->cast<c10::OptionalType>();
    if (argument.isNone() && optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType)
      argument = generator();
  }

  if (lossy) lossy_index_add(stack, torch::jit::last(*stack, 6));
  else op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (auto& [device, host] : arguments_on) {  // where out= was resized
    auto storage = device.storage();
    if (host.storage().data() != storage.data()) {
      auto bytes = host.storage().nbytes();
      auto data = device_allocator.allocate(bytes);
      std::memcpy(data.get(), host.storage().data(), bytes);
      storage.set_data_ptr_noswap(std::move(data));
      storage.set_nbytes(bytes);
    }
    if (host.sizes() != device.sizes() || host.strides() != device.strides())
      device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
  auto to_device = [&](const Tensor& result) {
    for (auto& [device, host] : arguments_on)
      if (host.is_same(result)) return device;
    auto key = result.storage().unsafeGetStorageImpl();
    if (!device_of.count(key)) device_of[key] = device_storage(result.storage());
    auto device = on_device(result, device_of[key]);
    traced.push_back(device);
    return device;
  };
  for (size_t i = 0; i < schema.returns().size(); i++) {
    IValue& result = torch::jit::peek(*stack, i, schema.returns().size());
    host_waits = host_waits || !(result.isNone() || result.isTensor() || result.isTensorList());
    replace_tensors(result, to_device);
  }
  log_.record(name, traced, constants.str(), true);
  if (host_waits) log_.sync(name);
}

void boxed(const c10::OperatorHandle& op, c10::Stack* stack) { run_on_host_memory(op, stack); }

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::HPU),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::HPU),
                                           c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto last_use = log_.last_use_of(to);
  log_.record("aten::copy_", {from, to}, "", from.is_hpu() && to.is_hpu());
  if (from.is_hpu() && to.is_hpu()) {
    log_.run_late_copies();
    on_host(to).copy_(on_host(from));
    return to;
  }
  auto& on_cpu = from.is_hpu() ? to : from;
  TORCH_CHECK(on_cpu.is_cpu(), "copy between hpu and ", on_cpu.device());
  log_.refuse_in_capture("a copy between host and device");
  bool asynchronous = non_blocking && PinnedAllocator::owns(on_cpu.data_ptr());
  auto bytes = static_cast<int64_t>(from.numel() * from.element_size());
  std::lock_guard lock(mutex);
  if (from.is_hpu()) {
    log_.d2h_copies++, log_.d2h_bytes += bytes;
    if (asynchronous && log_.copies == "late") {
      log_.pending.push_back({on_host(from, true), to, {}, log_.issued});
      return to;
    }
    log_.run_late_copies();
    Tensor(to).copy_(on_host(from));
    if (!asynchronous) log_.sync("aten::copy_");
    return to;
  }
  log_.h2d_copies++, log_.h2d_bytes += bytes;
  log_.h2d_blocking_copies += !asynchronous;
  log_.h2d_waits += last_use > log_.event_before;
  log_.drain();
  if (!asynchronous && last_use > log_.completed) log_.sync("a copy to memory in use");
  auto memory_of_to = on_host(to, true);
  if (asynchronous && log_.copies == "late") {
    log_.pending.push_back({from, memory_of_to, {}, log_.issued});
    return to;
  }
  log_.run_late_copies();
  memory_of_to.copy_(from);
  if (asynchronous && log_.copies == "checked" && from.is_contiguous())
    log_.pending.push_back({from, memory_of_to, from.clone(), log_.issued});
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& tensor) {
  log_.record("aten::_local_scalar_dense", {tensor}, "", false);
  log_.d2h_copies++, log_.d2h_bytes += tensor.element_size();
  log_.sync("aten::_local_scalar_dense");
  return on_host(tensor).item();
}

Tensor& set_empty(Tensor& self) {
  return self.set_(
      c10::Storage(c10::Storage::use_byte_size_t(), 0, device_allocator.allocate(0), &device_allocator, true), 0, {0},
      {});
}

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_", set_empty);
  // Native on the device, where torch would compose them of others, or that have to be told apart.
  for (auto name : {"embedding", "scatter_add", "scatter_add_", "addcmul", "addcdiv", "addcmul_", "addcdiv_", "sum",
                    "index_put", "index_put_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&boxed>());
}

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&boxed>()); }

// ---------------------------------------------------------------------------------------------------------------------
// Autocast
// ---------------------------------------------------------------------------------------------------------------------

const std::vector<std::string> lower_precision = {"addmm",
                                                  "addbmm",
                                                  "batch_norm",
                                                  "baddbmm",
                                                  "bmm",
                                                  "conv1d",
                                                  "conv2d",
                                                  "conv3d",
                                                  "conv_transpose1d",
                                                  "conv_transpose2d",
                                                  "conv_transpose3d",
                                                  "convolution",
                                                  "dot",
                                                  "dropout",
                                                  "feature_dropout",
                                                  "group_norm",
                                                  "instance_norm",
                                                  "layer_norm",
                                                  "leaky_relu",
                                                  "linear",
                                                  "matmul",
                                                  "mean",
                                                  "mm",
                                                  "mul",
                                                  "mv",
                                                  "softmax",
                                                  "log_softmax",
                                                  "scaled_dot_product_attention"};
const std::vector<std::string> float32 = {"acos",
                                          "addcdiv",
                                          "asin",
                                          "binary_cross_entropy",
                                          "binary_cross_entropy_with_logits",
                                          "cosh",
                                          "cross_entropy_loss",
                                          "div",
                                          "divide",
                                          "embedding",
                                          "embedding_bag",
                                          "erfinv",
                                          "exp",
                                          "expm1",
                                          "log",
                                          "log10",
                                          "log1p",
                                          "log2",
                                          "mse_loss",
                                          "nll_loss",
                                          "pow",
                                          "reciprocal",
                                          "rsqrt",
                                          "topk",
                                          "truediv"};
const std::vector<std::string> promote = {"add", "addcmul", "addcdiv", "cat",     "div",  "exp",
                                          "mul", "pow",     "sub",     "truediv", "stack"};

// One operator a line, in place of the default list, from the file that the variable names.
Names autocast_list(const char* variable, const std::vector<std::string>& standard) {
  std::ifstream file(environment(variable, ""));
  if (!file.is_open()) {
    if (std::getenv(variable)) TORCH_WARN("can't read the file that ", variable, " names; using the default list");
    return {standard.begin(), standard.end()};
  }
  Names names;
  for (std::string name; file >> name;) names.insert(name);
  return names;
}

enum class Cast { lower, float32, promote };

template <Cast rule>
void autocast(const c10::OperatorHandle& op, c10::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastHPU);
  static const Names first_only = {"aten::batch_norm", "aten::group_norm", "aten::instance_norm", "aten::layer_norm"};
  auto count = op.schema().arguments().size();
  auto eligible = [](const Tensor& t) { return t.is_hpu() && t.is_floating_point() && t.scalar_type() != at::kDouble; };
  auto to = rule == Cast::float32 ? at::kFloat : at::autocast::get_autocast_dtype(DeviceType::HPU);
  if (rule == Cast::promote)
    for (size_t i = 0; i < count; i++)
      replace_tensors(torch::jit::peek(*stack, i, count), [&](const Tensor& tensor) {
        if (eligible(tensor) && tensor.scalar_type() == at::kFloat) to = at::kFloat;
        return tensor;
      });
  for (size_t i = 0; i < (first_only.count(op.schema().name()) ? 1 : count); i++)
    replace_tensors(torch::jit::peek(*stack, i, count),
                    [&](const Tensor& tensor) { return eligible(tensor) ? tensor.to(to) : tensor; });
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(_, AutocastHPU, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastHPU, m) {
  auto to_lower = autocast_list("PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST", lower_precision);
  auto to_float32 = autocast_list("PT_HPU_AUTOCAST_FP32_OPS_LIST", float32);
  Names to_widest(promote.begin(), promote.end());
  for (auto& op : c10::Dispatcher::singleton().getAllOpNames()) {
    if (op.name.rfind("aten::", 0) != 0) continue;
    auto handle = c10::Dispatcher::singleton().findSchema(op);
    if (!handle || handle->schema().is_mutable()) continue;
    auto name = op.name.substr(6);
    auto full = op.overload_name.empty() ? name : name + "." + op.overload_name;
    if (to_lower.count(name)) m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&autocast<Cast::lower>>());
    else if (to_float32.count(name))
      m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&autocast<Cast::float32>>());
    else if (to_widest.count(name))
      m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&autocast<Cast::promote>>());
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// For Python
// ---------------------------------------------------------------------------------------------------------------------

c10::Dict<std::string, int64_t> counters() {
  std::lock_guard lock(mutex);
  c10::Dict<std::string, int64_t> all;
  for (auto& [name, value] :
       std::initializer_list<std::pair<const char*, int64_t>>{{"d2h_syncs", log_.d2h_syncs},
                                                              {"d2h_copies", log_.d2h_copies},
                                                              {"d2h_bytes", log_.d2h_bytes},
                                                              {"h2d_copies", log_.h2d_copies},
                                                              {"h2d_bytes", log_.h2d_bytes},
                                                              {"h2d_blocking_copies", log_.h2d_blocking_copies},
                                                              {"synchronizations", log_.synchronizations},
                                                              {"mark_steps", log_.mark_steps},
                                                              {"compilations", log_.compilations},
                                                              {"events", log_.events},
                                                              {"drains", log_.drains},
                                                              {"h2d_waits", log_.h2d_waits},
                                                              {"locking_waits", log_.locking_waits},
                                                              {"memory", memory.live},
                                                              {"peak_memory", memory.peak},
                                                              {"memory_limit", memory.limit},
                                                              {"allocations", memory.allocations},
                                                              {"frees", memory.frees},
                                                              {"largest_allocation", memory.largest}})
    all.insert(name, value);
  return all;
}

TORCH_LIBRARY(hpu_emulator, m) {
  m.def("host(Tensor tensor) -> Tensor", [](const Tensor& tensor) {
    TORCH_CHECK(tensor.is_hpu(), "expected a tensor on hpu, got one on ", tensor.device());
    log_.run_late_copies();
    return on_host(tensor, true);
  });
  m.def("adopt(Tensor host) -> Tensor",
        [](const Tensor& host) { return on_device(host, device_storage(host.storage())); });
  m.def("record(str op, Tensor[] tensors, str constants) -> ()",
        [](const std::string& op, const std::vector<Tensor>& tensors, const std::string& constants) {
          log_.refuse_in_capture("a custom operator");
          log_.record(op, tensors, constants, true);
        });
  m.def("set_capturing(bool on) -> ()", [](bool on) { log_.capturing = on; });
  m.def("begin_replay(Tensor[] tensors) -> ()", [](const std::vector<Tensor>& tensors) {
    log_.refuse_in_capture("a replay");
    log_.run_late_copies();
    log_.record("replay", tensors, "", true);
    log_.replaying = true;
  });
  m.def("end_replay() -> ()", [] { log_.replaying = false; });
  m.def("mark(str name) -> ()", [](const std::string& name) { log_.mark(name); });
  m.def("compiled() -> ()", [] { log_.compilations++; });
  m.def("start_trace() -> ()", [] {
    std::lock_guard lock(mutex);
    log_.tracing = true;
    log_.records.clear();
  });
  m.def("stop_trace() -> str[]", [] {
    std::lock_guard lock(mutex);
    log_.tracing = false;
    return std::exchange(log_.records, {});
  });
  m.def("counters() -> Dict(str, int)", counters);
  m.def("cpu_fallbacks() -> str[]", [] { return log_.cpu_fallbacks; });
  m.def("reset_peak_memory() -> ()", [] { memory.peak = memory.live; });
  m.def("set_lazy(bool on) -> ()", [](bool on) { lazy = on; });
  m.def("set_copies(str when) -> ()", [](const std::string& when) {
    TORCH_CHECK(when == "now" || when == "late" || when == "checked", "copies: now, late or checked, not ", when);
    log_.run_late_copies();
    log_.pending.clear();
    log_.copies = when;
  });
  m.def("mark_step(bool wait) -> ()", [](bool wait) {
    std::lock_guard lock(mutex);
    log_.refuse_in_capture("mark_step");
    log_.mark_steps++;
    log_.mark("mark_step");
    log_.end_graph();
    if (wait) log_.sync("mark_step");
  });
  m.def("implied_mark(str cause) -> ()", [](const std::string& cause) {
    std::lock_guard lock(mutex);
    log_.imply_mark(cause);
  });
  m.def("synchronize() -> ()", [] {
    std::lock_guard lock(mutex);
    log_.refuse_in_capture("synchronize");
    log_.synchronizations++;
    log_.mark("synchronize");
    log_.complete(log_.issued);
  });
  // Events are numbers of pieces of work.
  m.def("record_event(bool is_new) -> int", [](bool is_new) {
    std::lock_guard lock(mutex);
    log_.refuse_in_capture("recording an event");
    TORCH_CHECK(log_.live_events + is_new <= most_events, "Reached Max No of Timer Events allowed");
    log_.events++, log_.live_events += is_new;
    log_.event_before = std::exchange(log_.last_event, log_.issued);
    log_.mark("event");
    log_.drain();
    if (lazy && log_.graph) log_.imply_mark("event");
    return log_.issued;
  });
  m.def("free_event() -> ()", [] {
    std::lock_guard lock(mutex);
    log_.live_events--;
  });
  m.def("completed() -> int", [] { return log_.completed; });
  m.def("wait_for(int number, bool locks) -> ()", [](int64_t number, bool locks) {
    std::lock_guard lock(mutex);
    log_.synchronizations++;
    log_.locking_waits += locks;
    log_.mark("wait for event");
    log_.complete(number);
  });
  m.def("seed(int seed) -> ()", [](int64_t seed) { generator().set_current_seed(seed); });
  m.def("rng_state() -> Tensor", [] { return generator().get_state(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& state) { generator().set_state(state); });
}

}  // namespace
