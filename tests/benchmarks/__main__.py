"""Time, memory and gradient noise of the objectives, as ratios within one run.

    python -m tests.benchmarks [--hosts numpyro pyro] [--output benchmark_output]

Each host is measured in processes of their own, with one thread on one core. The steps compared
take turns, and a ratio is the median over rounds of the ratio within a round. Targets are printed
beside what was reached; nothing here fails.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.settings import (
    BATCH_SIZE,
    LAYER_1_SHAPE,
    MEMORY_CHUNK,
    MEMORY_PARTICLES,
    NUM_AUXILIARY,
    NUM_PARTICLES,
)
from tests.benchmarks.timing import median_ratio

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}
# glibc keeps freed blocks below a threshold that grows as it goes, so that resident memory creeps
# up while what is in use does not. A fixed threshold makes the two the same.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
HANDWRITTEN_TARGET = {"numpyro": 1.10, "pyro": 1.35}


def run_child(module: str, *arguments: str, **environment: str) -> dict:
    """Run a module of this package in a fresh process with one thread and parse what it prints."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    print("  " + " ".join(command[1:]), flush=True)
    child = subprocess.run(
        command,
        env=os.environ | ONE_THREAD | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def pin_to_one_core() -> None:
    """Keep this process and its children on one core, where the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def measure(host: str) -> dict:
    print(f"\nMeasuring {host}:")
    memory = {k: run_child("memory", host, str(k), **RETURN_FREED_MEMORY) for k in MEMORY_PARTICLES}
    return {**run_child(f"{host}_steps"), "memory": memory}


def rows(host: str, results: dict) -> list[tuple[str, str, str]]:
    """What was measured, what was reached, and the target if there is one."""
    table = []
    for num_particles in NUM_PARTICLES:
        steps = results["steps"][str(num_particles)]
        at_k = f"K={num_particles}"

        def ratio(name: str, base: str, steps: dict = steps) -> str:
            return f"{median_ratio(steps[name], steps[base]):.3f}"

        seconds = statistics.median(steps["OVIS"])
        table.append((f"OVIS step, {at_k}", f"{1e3 * seconds:.2f} ms", ""))
        for name in ("VIMCO", "OVIS"):
            what = f"{name} / no control variate, {at_k}"
            table.append((what, ratio(name, "IWAE"), "<= 1.05"))
        # Auxiliary particles cost a forward pass: at most what as many more in the bound would.
        share = 1.05 * (num_particles + NUM_AUXILIARY) / num_particles
        for what, name, base, target in (
            ("NVIL / no control variate", "NVIL", "IWAE", "<= 1.10"),
            ("TVO / no control variate", "TVO", "IWAE", "<= 1.10"),
            (f"OVIS, S={NUM_AUXILIARY} / no control variate", "OVIS-MC", "IWAE", f"<= {share:.2f}"),
            ("autoencoder, DReG / pathwise", "dreg", "pathwise", "<= 2.00"),
        ):
            table.append((f"{what}, {at_k}", ratio(name, base), target))
        for name, base, target in (
            ("OVIS", "handwritten", f"<= {HANDWRITTEN_TARGET[host]:.2f}"),
            ("OVIS, no validation", "handwritten", f"<= {HANDWRITTEN_TARGET[host]:.2f}"),
            ("OVIS", "RenyiELBO", "<= 1.00"),
        ):
            if name in steps and base in steps:
                what = f"{name} / {base} step, {at_k}"
                is_asked = base == "RenyiELBO" or num_particles == 50
                table.append((what, ratio(name, base), target if is_asked else ""))
        noise = results["noise"][str(num_particles)]
        for name in ("VIMCO", "OVIS"):
            what = f"gradient noise, no control variate / {name}, {at_k}"
            table.append((what, f"{noise['IWAE'] / noise[name]:.0f}", ""))

    layer_1 = results["layer_1"]
    for name in ("VIMCO", "OVIS"):
        percent = 100 * median_ratio(layer_1[name], layer_1["model"])
        shape = list(LAYER_1_SHAPE)
        table.append((f"{name} layer 1 on {shape} / model's step", f"{percent:.2f} %", "< 5 %"))

    few, many = (results["memory"][k]["peak_bytes"] for k in MEMORY_PARTICLES)
    what = f"peak memory, K={MEMORY_PARTICLES[1]:,}, chunk_size={MEMORY_CHUNK}"
    table.append((what, f"{many / 1e9:.2f} GB", "< 2 GB"))
    table.append((f"  / that at K={MEMORY_PARTICLES[0]:,}", f"{many / few:.2f}", "<= 1.20"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", nargs="+", default=["numpyro", "pyro"])
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    arguments = parser.parse_args()
    pin_to_one_core()
    results = {host: measure(host) for host in arguments.hosts}

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "benchmarks.json"
    machine = {"platform": platform.platform(), "python": platform.python_version()}
    path.write_text(json.dumps({"machine": machine, **results}, indent=1))
    print(f"\nSigmoid belief network, 2 x 200 units, batch of {BATCH_SIZE} digits, one thread.")
    print("The autoencoder: 200 tanh units and 50 Gaussian latents.")
    for host, result in results.items():
        print(f"\n{host:56}{'reached':>12}{'target':>12}")
        for what, reached, target in rows(host, result):
            print(f"{what:56}{reached:>12}{target:>12}")
    print(f"\nSaved as {path}")


if __name__ == "__main__":
    main()
