"""XLA's flags for the programs that tests compile."""

DEVICES = "--xla_force_host_platform_device_count=8"
# Most of the tests' time is compilation. Level 0 halves it. The older code generator for fusions and a single compiler
# thread leave a third of that. Programs are slower then, and the other cores belong to the other workers anyway.
QUICK_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
