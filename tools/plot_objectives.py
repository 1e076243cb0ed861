"""Draw docs/images/drpo_weight.png, the gradient weight of DRPO: `python tools/plot_objectives.py`.

For docs/objectives.md. The weight comes from `megatron_drpo.objectives.drpo` itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from megatron_drpo.objectives import drpo

DELTAS = (0.05, 0.5, 12.5)
IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "drpo_weight.png"


def draw(path: Path, resolution: int = 200) -> None:
    """Write the picture: advantage above and below 0 by delta, mu across, pi up."""
    axis = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution
    pi, mu = torch.meshgrid(axis, axis, indexing="ij")
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    grid = figure.subplots(2, len(DELTAS), sharex=True, sharey=True)
    for row, (advantage, sign) in zip(grid, ((1.0, ">"), (-1.0, "<")), strict=True):
        for ax, delta in zip(row, DELTAS, strict=True):
            advantages = torch.full_like(pi, advantage)
            weight = drpo(pi.log(), mu.log(), advantages, delta=delta).gradient_weights
            norm = TwoSlopeNorm(1, vmin=-1, vmax=3)
            area = (0, 1, 0, 1)
            image = ax.imshow(weight, origin="lower", extent=area, cmap="RdBu", norm=norm)
            # matplotlib warns of a level that the weight never reaches.
            lines = {0.0: "solid", 0.5: "dashed"} if weight.min() < 0 else {}
            for level, style in lines.items():
                ax.contour(mu, pi, weight, [level], colors="black", linewidths=1, linestyles=style)
            ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="dotted")
            bounds = f"[{1 - 1 / delta:.3g}, {1 + 1 / delta:.3g}]"
            ax.set_title(f"A {sign} 0, delta {delta:g}: w inside {bounds}", fontsize=10)
        row[0].set_ylabel("pi, current policy")
    for ax in grid[-1]:
        ax.set_xlabel("mu, behaviour policy")
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.8, ticks=[-1, 0, 0.5, 1, 2, 3])
    bar.set_label("gradient weight w (1: plain policy gradient)")
    figure.suptitle("DRPO: w = 0 on solid lines, 1/2 on dashed ones; dotted: pi = mu", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the gradient weight of DRPO.")
    parser.add_argument("--output", type=Path, default=IMAGE, help="a .png file")
    path = parser.parse_args().output
    draw(path)
    print(path)


if __name__ == "__main__":
    main()
