"""Train a sigmoid belief network on real digits with OVIS and VIMCO, and look at what they do.

    make quickstart              # NumPyro
    make quickstart HOST=pyro    # Pyro

The model and all that touches the host is in ``sbn_numpyro.py`` and ``sbn_pyro.py``; this file is
the experiment. GRADEST_SMOKE=1 shortens it.
"""

import argparse
import importlib
import os
import time
from pathlib import Path

import quickstart_figures as figures
from digits import load_digits

SMOKE = os.environ.get("GRADEST_SMOKE") == "1"
NUM_PARTICLES = 10  # of the bound that is trained
NUM_EPOCHS = 1 if SMOKE else 20
NUM_HELD_OUT = 10 if SMOKE else 500
SNR_PARTICLES = (4,) if SMOKE else (4, 16, 64, 256)


def main(host: str, folder: Path) -> None:
    start = time.perf_counter()
    gradest = importlib.import_module(f"{host}_gradest")
    sbn = importlib.import_module(f"sbn_{host}")
    digits = load_digits()
    held_out = digits.held_out[:NUM_HELD_OUT]

    def objectives(num_particles: int) -> dict:
        """One bound, three estimators of its gradient."""
        return {
            "OVIS": gradest.OVIS(num_particles, **sbn.OPTIONS),
            "VIMCO": gradest.VIMCO(num_particles, **sbn.OPTIONS),
            "score function": gradest.IWAE(num_particles, **sbn.OPTIONS),
        }

    # Train with each of them.
    fits = {}
    for name, objective in objectives(NUM_PARTICLES).items():
        network = sbn.SigmoidBeliefNetwork(digits.pixel_logits)
        fits[name] = sbn.fit(network, objective, digits.train, num_epochs=NUM_EPOCHS, label=name)

    # Compare where it counts: a tight bound on images that none of them has seen.
    print("Bounding the held-out digits with 1,000 particles each ...")
    bounds = {name: sbn.held_out_bound(fit, held_out) for name, fit in fits.items()}

    # Signal and noise of the gradient against K, at the network that OVIS trained. All three are
    # unbiased, so they have one signal between them: the quietest measures it best.
    print("Measuring gradient signal and noise ...")
    snr = {name: [] for name in fits}
    for num_particles in SNR_PARTICLES:
        num_draws = 100 if SMOKE else min(max(12_800 // num_particles, 60), 1000)
        moments = {
            name: sbn.gradient_moments(fits["OVIS"], objective, held_out[:10], num_draws=num_draws)
            for name, objective in objectives(num_particles).items()
        }
        signal, _ = moments["OVIS"]
        for name, (_, variance) in moments.items():
            snr[name].append((signal / variance) ** 0.5 if signal > 0 else float("nan"))

    folder.mkdir(parents=True, exist_ok=True)
    paths = figures.save(
        folder,
        curves={name: fit.bounds for name, fit in fits.items()},
        bounds=bounds,
        snr_particles=SNR_PARTICLES,
        snr=snr,
        originals=held_out[:10],
        reconstructions=sbn.reconstruct(fits["OVIS"], held_out[:10]),
        samples=sbn.draw_images(fits["OVIS"], 20),
    )
    print_summary(bounds, snr)
    print(
        f"{NUM_EPOCHS} epochs each on {len(digits.train)} digits, {len(held_out)} held out, ",
        end="",
    )
    print(f"{time.perf_counter() - start:.0f} s in all. Figures:")
    print("\n".join(f"  {path}" for path in paths))


def print_summary(bounds: dict[str, float], snr: dict[str, list[float]]) -> None:
    most = SNR_PARTICLES[-1]
    print(f"\n{'':16}{'held-out bound':>16}{'gradient SNR':>16}")
    print(f"{'':16}{'K=1000, nats':>16}{f'K={most}':>16}")
    for name, bound in bounds.items():
        print(f"{name:16}{bound:16.2f}{snr[name][-1]:16.2g}")
    print(
        "\nOVIS and VIMCO coincide here: the log-weights of this model lie many nats apart, and\n"
        "then VIMCO's geometric mean vanishes beside the sum of the other weights.\n"
        "`make snr` shows a model on which they part.\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"))
    arguments = parser.parse_args()
    main(arguments.host, arguments.output / arguments.host)
