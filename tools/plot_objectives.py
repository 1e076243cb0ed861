"""Draw the gradient weights of the objectives for docs/objectives.md.

`python tools/plot_objectives.py` writes docs/images/objective_weights.png (one column per
objective), docs/images/drpo_weight.png (DRPO by delta) and, for the README,
docs/images/trust_region.png (four of them along one line). The weights are those that
`megatron_drpo.objectives.build_objective` gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from megatron_drpo.config import ObjectiveConfig
from megatron_drpo.objectives import Tokens, build_objective

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BY_DELTA = {
    f"drpo, delta {delta:g}\nw in [{1 - 1 / delta:.3g}, {1 + 1 / delta:.3g}]": ObjectiveConfig(
        drpo_delta=delta
    )
    for delta in (0.05, 0.5, 12.5)
}
FAMILY = {
    "drpo\ndelta 0.15": ObjectiveConfig("drpo", drpo_delta=0.15),
    "dppo_tv\ndelta 0.15": ObjectiveConfig("dppo_tv"),
    "dppo_kl\ndelta 0.05": ObjectiveConfig("dppo_kl"),
    "ppo\nclip 0.2, 0.28": ObjectiveConfig("ppo", ppo_clip_high=0.28),
    "spo\nepsilon 0.5": ObjectiveConfig("spo", spo_epsilon=0.5),
    "cispo\nclip 1, 0.28": ObjectiveConfig("cispo", cispo_clip_high=0.28),
    "gspo, one token\nclip 0.2, 0.28": ObjectiveConfig(
        "gspo", gspo_clip_low=0.2, gspo_clip_high=0.28
    ),
    "pg_is": ObjectiveConfig("pg_is"),
}
RESOLUTION = 250
LINES = {
    "PPO, clip 0.2": (ObjectiveConfig("ppo"), "#718096", "-"),
    "SPO, epsilon 0.5": (ObjectiveConfig("spo", spo_epsilon=0.5), "#2f855a", "--"),
    "DPPO, delta 0.15": (ObjectiveConfig("dppo_tv"), "#c05621", "-"),
    "DRPO, delta 0.15": (ObjectiveConfig("drpo", drpo_delta=0.15), "#2b6cb0", "-"),
}
"""By label: objective, colour and style."""


def weights(config: ObjectiveConfig, advantage: float) -> tuple[torch.Tensor, ...]:
    """(mu, pi, w), each [RESOLUTION, RESOLUTION]: mu grows to the right, pi upwards."""
    axis = (torch.arange(RESOLUTION, dtype=torch.float64) + 0.5) / RESOLUTION
    pi, mu = torch.meshgrid(axis, axis, indexing="ij")
    return mu, pi, weight_of(config, mu.flatten(), pi.flatten(), advantage).view_as(pi)


def weight_of(
    config: ObjectiveConfig, mu: torch.Tensor, pi: torch.Tensor, advantage: float
) -> torch.Tensor:
    """[N]: w at each pair of `mu` and `pi`, both [N]."""
    tokens = Tokens(
        *(pi.log(), mu.log(), torch.full_like(pi, advantage)),
        sequence_log_ratio=(pi / mu).log(),  # for gspo: sequences of a single token
        sequence_length=torch.ones(pi.numel()),
    )
    return build_objective(config)(tokens).gradient_weights


def draw(path: Path, title: str, panels: Mapping[str, ObjectiveConfig]) -> None:
    """Write a picture: a column for each of `panels`, advantages above 0 over those below."""
    columns = len(panels)
    figure = Figure(figsize=(1.9 * columns + 1.2, 4.6), layout="constrained")
    grid = figure.subplots(2, columns, sharex=True, sharey=True)
    norm = TwoSlopeNorm(1, vmin=-1, vmax=3)
    image = None
    for row, advantage in zip(grid, (1.0, -1.0), strict=True):
        for ax, (name, config) in zip(row, panels.items(), strict=True):
            mu, pi, weight = weights(config, advantage)
            area = (0, 1, 0, 1)
            image = ax.imshow(weight, origin="lower", extent=area, cmap="RdBu", norm=norm)
            for level, style in {0.0: "solid", 0.5: "dashed"}.items():
                if weight.min() < level:  # matplotlib warns of a level that is never reached
                    line = {"colors": "black", "linewidths": 0.8, "linestyles": style}
                    ax.contour(mu, pi, weight, [level], **line)
            ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="dotted")
            if advantage > 0:
                ax.set_title(name, fontsize=10)
        row[0].set_ylabel(f"A {'>' if advantage > 0 else '<'} 0\npi, current policy")
    for ax in grid[-1]:
        ax.set_xlabel("mu, behaviour")
    assert image is not None
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.8, ticks=[-1, 0, 0.5, 1, 2, 3])
    bar.set_label("gradient weight w (1: plain policy gradient)")
    figure.suptitle(f"{title}: w = 0 on solid lines, 1/2 on dashed ones; dotted: pi = mu")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def draw_lines(path: Path) -> None:
    """Write the picture of a common and of a rare token, both to be made more likely."""
    figure = Figure(figsize=(8.2, 2.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    tokens = ((0.4, 0.8, "a common token"), (0.01, 0.3, "a rare token"))
    for ax, (mu, most, what) in zip(axes, tokens, strict=True):
        pi = torch.linspace(mu / 50, most, 4 * RESOLUTION, dtype=torch.float64)
        for label, (config, color, style) in LINES.items():
            weight = weight_of(config, torch.full_like(pi, mu), pi, 1.0)
            ax.plot(pi, weight, style, color=color, label=label, linewidth=1.8)
        ax.axvline(mu, color="grey", linewidth=0.8, linestyle="dotted")
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(title=f"{what}, mu = {mu:g}, A > 0", xlabel="pi, current policy", ylim=(-1.1, 2.1))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("gradient weight w")
    axes[0].legend(frameon=False, fontsize=8.5, loc="upper right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the gradient weights of the objectives.")
    parser.add_argument("--output-dir", type=Path, default=IMAGES, help="receives three .png files")
    directory = parser.parse_args().output_dir
    for name, title, panels in (
        ("objective_weights", "Gradient weights", FAMILY),
        ("drpo_weight", "DRPO", BY_DELTA),
    ):
        path = directory / f"{name}.png"
        draw(path, title, panels)
        print(path)
    path = directory / "trust_region.png"
    draw_lines(path)
    print(path)


if __name__ == "__main__":
    main()
