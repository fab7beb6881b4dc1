"""halfbyte doctor"""

from __future__ import annotations

from halfbyte.cli.console import Json, emit

_WANTED = ("torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "gguf", "huggingface_hub")
_READERS = {
    "compressed-tensors": "compressed-tensors folders",
    "bitsandbytes": "NF4 and FP4 folders",
    "peft": "adapters",
}


def command(json: Json = False) -> None:
    """Say what this machine and installation can do."""
    import os
    import platform
    import sys
    from importlib.metadata import PackageNotFoundError, version

    import psutil
    import torch

    from halfbyte import kernels

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    memory = psutil.virtual_memory()
    found = {
        "halfbyte": of("halfbyte"),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.is_available(),
        "packages": {p: of(p) for p in _WANTED},
        "kernels": kernels.machine() | kernels.served_by(),
        "readers": {f"{p} ({what})": of(p) for p, what in _READERS.items()},
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") == "1",
    }
    if json:
        emit(found)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for k, v in value.items():
                print(f"  {k:44} {v or 'not installed'}")
        else:
            print(f"{name:16} {value}")
    missing = [p for p in _WANTED if not found["packages"][p]]
    print("missing: " + ", ".join(missing) if missing else "all that halfbyte needs is installed")
