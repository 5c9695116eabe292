"""Train a sigmoid belief network on real digits with OVIS and VIMCO, and look at what they do.

    make quickstart              # NumPyro
    make quickstart HOST=pyro    # Pyro

The model and everything that touches the host is in ``sbn_numpyro.py`` and ``sbn_pyro.py``; this file
is the experiment. GRADEST_SMOKE=1 shortens it to seconds.
"""

import argparse
import importlib
import os
import time
from pathlib import Path

import quickstart_figures as figures
from digits import load_digits

SMOKE = os.environ.get("GRADEST_SMOKE") == "1"
NUM_PARTICLES = 10  # in training
NUM_EPOCHS = 1 if SMOKE else 30
NUM_HELD_OUT = 20 if SMOKE else 1000
SNR_PARTICLES = (3, 10) if SMOKE else (3, 10, 30, 100, 300)
SNR_DRAWS = 10 if SMOKE else 15_000


def main(host: str, folder: Path) -> None:
    start = time.perf_counter()
    gradest = importlib.import_module(f"{host}_gradest")
    sbn = importlib.import_module(f"sbn_{host}")
    digits = load_digits()
    held_out = digits.held_out[:NUM_HELD_OUT]

    def objectives(num_particles: int) -> dict:
        """One bound, three estimators of its gradient."""
        return {
            "OVIS": gradest.OVIS(num_particles, vectorize_particles=True),
            "VIMCO": gradest.VIMCO(num_particles, vectorize_particles=True),
            "score function": gradest.IWAE(num_particles, vectorize_particles=True),
        }

    # 1. Train with each.
    fits = {}
    for name, objective in objectives(NUM_PARTICLES).items():
        network = sbn.SigmoidBeliefNetwork(digits.pixel_logits)
        fits[name] = sbn.fit(network, objective, digits.train, num_epochs=NUM_EPOCHS, label=name)

    # 2. Compare them where it counts: a tight bound on images that none of them has seen.
    bounds = {name: sbn.held_out_bound(fit, held_out) for name, fit in fits.items()}

    # 3. Gradient signal and noise against the number of particles, at one trained network. All
    # three estimators are unbiased, so they share one signal; the quietest of them measures it.
    snr = {name: [] for name in fits}
    for num_particles in SNR_PARTICLES:
        moments = {}
        for name, objective in objectives(num_particles).items():
            is_quietest = name == "OVIS"
            num_draws = min(max(SNR_DRAWS // num_particles, 100), 1000) if is_quietest else 20
            moments[name] = sbn.gradient_moments(
                fits["OVIS"], objective, held_out[:10], num_draws=num_draws
            )
        signal = moments["OVIS"][0]
        for name, (_, variance) in moments.items():
            snr[name].append((max(signal, 0.0) / variance) ** 0.5)

    # 4. Draw.
    folder.mkdir(parents=True, exist_ok=True)
    paths = figures.save(
        folder,
        host=host,
        curves={name: fit.bounds for name, fit in fits.items()},
        bounds=bounds,
        snr_particles=SNR_PARTICLES,
        snr=snr,
        originals=held_out[:10],
        reconstructions=sbn.reconstruct(fits["OVIS"], held_out[:10]),
        samples=sbn.draw_images(fits["OVIS"], 40),
    )

    most = SNR_PARTICLES[-1]
    print(f"\n{'':16}{'held-out bound':>16}{'gradient SNR':>16}")
    print(f"{'':16}{'K=1000, nats':>16}{f'K={most}':>16}")
    for name in fits:
        print(f"{name:16}{bounds[name]:16.2f}{snr[name][-1]:16.2g}")
    print(f"\n{len(digits.train)} training and {len(held_out)} held-out digits, ", end="")
    print(f"{NUM_EPOCHS} epochs each, {time.perf_counter() - start:.0f} s in all. Figures:")
    print("\n".join(f"  {path}" for path in paths))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"))
    arguments = parser.parse_args()
    main(arguments.host, arguments.output / arguments.host)
