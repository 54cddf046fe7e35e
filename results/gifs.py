"""Writes the two animations of the README from saved policies: results/figures/{target-reaching,halfcheetah}.gif.

python results/gifs.py results/runs/TargetReaching-v0-penalty10/sac_pmoe/s1
MUJOCO_GL=egl python results/gifs.py results/runs/HalfCheetah-v5-ppo-kl/ppo_pmoe-both/s1

A run of target reaching gives five stochastic episodes on the map, each step in the colour of the expert that acts; any
other task its own picture during the first episode of the evaluation, under a bar in the colour of the acting expert.
The policy is RUN_DIR/policy.pt or the committed one. A file stays below 2 MB.
"""

import io
import sys
from pathlib import Path

import maps
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import trajectories
from matplotlib.colors import to_hex
from PIL import Image, ImageColor
from policy import FOLDER, Player, load

MOST = 2_000_000  # bytes
EPISODES, STRIDE = 5, 4  # steps between the frames of a flight
SIZE, FRAMES, BAR = 240, 90, 10  # pixels and frames of another task's picture, height of the bar in pixels
PACE = 50  # ms per frame


def flights(player: Player) -> list[Image.Image]:
    """The map, where paths grow; earlier episodes stay, fainter."""
    table = pd.read_csv(io.StringIO("\n".join(["thing,x,y,radius", *trajectories.layout(player.saved.env)])))
    figure, axis = plt.subplots(figsize=(3, 3), dpi=100, layout="constrained")
    maps.arena(axis, table)
    frames = []
    for _ in range(EPISODES):
        path = [(info["position"], k) for _, info, k in player.episode(0, "stochastic")]
        places, drawn = np.array([place for place, _ in path]), []
        (dot,) = axis.plot(*places[0], "o", color="k", markersize=4)
        for step in range(1, len(path)):
            drawn += axis.plot(*places[step - 1 : step + 1].T, color=maps.colour(path[step][1]), linewidth=1.5)
            if step % STRIDE == 0 or step == len(path) - 1:
                dot.set_data(*places[step][:, None])
                figure.canvas.draw()
                frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
        for line in drawn:
            line.set_alpha(0.35)
    plt.close(figure)
    return frames


def pictures(player: Player) -> list[Image.Image]:
    """What the environment shows, every second step after the first 200, under a bar in the acting expert's colour."""
    frames = []
    for step, (_, _, k) in enumerate(player.episode(0, "stochastic")):
        if step >= 200 and step % 2 == 0:
            frames.append(Image.fromarray(player.saved.env.render()).resize((SIZE, SIZE)))
            frames[-1].paste(ImageColor.getrgb(to_hex(maps.colour(k))), (0, 0, SIZE, BAR))
        if len(frames) == FRAMES:
            break
    return frames


def main(run_dir: Path) -> Path:
    reaching = run_dir.resolve().parts[-3].startswith("TargetReaching")
    player = Player(load(run_dir, **({} if reaching else {"render_mode": "rgb_array"})))
    torch.manual_seed(player.saved.args.seed)
    frames = (flights if reaching else pictures)(player)
    path = FOLDER / "figures" / ("target-reaching.gif" if reaching else "halfcheetah.gif")
    sheet = Image.fromarray(np.hstack(frames[:: max(1, len(frames) // 12)]))
    colours = sheet.quantize(64)  # one palette for all
    frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=PACE, loop=0, optimize=True)
    if path.stat().st_size > MOST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {MOST:,}")
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(main(Path(sys.argv[1])))
