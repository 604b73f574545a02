from habana_frameworks.autoload import is_lazy  # noqa: F401
