"""An image-to-image loop and the decoder of Stable Diffusion, against diffusers.

    python benchmarks/diffusion.py --out=benchmarks/results/diffusion_cpu

Needs torch and diffusers beside prism_jax. The networks are Stable Diffusion 1.5's at a quarter of
its width: a quarter of the channels, heads and groups, so that a head and a group are as wide as
there. Seven of DDIM's ten steps from an anchor (strength 0.7) with classifier-free guidance, on
latents of 32 x 32; and 32 x 32 latents to images of 256 px. Both sides have the same weights and
inputs, and are seen to make the same of them before any is timed.
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

import measuring
import numpy as np

WORKS = ("img2img", "decode")
SIDES = ("ours", "torch")
STEPS, STRENGTH, GUIDANCE = 10, 0.7, 8.0
TOKENS, CONTEXT = 77, 192
UNET: dict[str, Any] = {
    "block_out_channels": [80, 160, 320, 320],
    "attention_head_dim": 2,  # diffusers' name for the number of heads
    "cross_attention_dim": CONTEXT,
    "norm_num_groups": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": [32, 64, 128, 128],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
NOISE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SAME = 1e-3  # of the difference's norm in that of the result; float32 on both sides
SHOWN = 4  # every so manyth row and column of an image is compared


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that keeps maps near one, drawn from its name; float32 in PyTorch's layout."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if len(shape) > 1:
        return drawn / np.float32(np.sqrt(np.prod(shape[1:])))
    return np.float32(0.1) * drawn + np.float32(name.endswith("weight"))


def inputs(spec: dict) -> dict[str, np.ndarray]:
    """Anchors and noise (B, H, W, 4), and what the text says (B, 77, 192): something, nothing."""
    rng = np.random.default_rng(1)
    latent = (spec["batch"], spec["size"], spec["size"], 4)
    text = (spec["batch"], TOKENS, CONTEXT)
    shapes = {"anchors": latent, "noise": latent, "told": text, "null": text}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def our_side(spec: dict):
    """The sampler's scan, and the codec."""
    import ours

    ours.begin(spec)
    import jax
    import jax.numpy as jnp

    from prism_jax.diffusion import autoencoder, guidance, huggingface, samplers, unet
    from prism_jax.models import import_torch

    class Ours(ours.Rates):
        def __init__(self):
            super().__init__(spec["device"])
            part, build, config = {
                "img2img": ("unet", unet.from_config, UNET),
                "decode": ("vae", autoencoder.from_config, VAE),
            }[spec["work"]]
            module: Any = build(config).clone(dtype=jnp.dtype(spec["precision"]))
            like = huggingface.shapes(part, module)
            leaves = import_torch.torch_leaves({"params": like})
            tensors = {name: weight(name, leaf.torch_shape) for name, leaf in leaves.items()}
            self._module, self._given = module, jax.device_put(inputs(spec))
            self._params = jax.device_put(huggingface.lay_out(tensors, like, "these", part))
            self._made = jax.jit(img2img if spec["work"] == "img2img" else decode)

        def run(self, count: int) -> None:
            for _ in range(count):
                self._last = self._made(self._params, self._given)
                jax.block_until_ready(self._last)

        def shown(self) -> list:
            return np.asarray(self._last)[:, ::SHOWN, ::SHOWN].tolist()

        def facts(self) -> dict:
            counted = {"flops": 0.0, "values": 0.0}
            return ours.facts(counted, spec)

    def img2img(params, given):
        sampling = samplers.Sampling(
            sampler="ddim", steps=STEPS, strength=STRENGTH, guidance=GUIDANCE
        )

        def predict(noisy_BHWC, time):
            return guidance.classifier_free(
                lambda *seen: side._module.predict(params, *seen),
                noisy_BHWC, jnp.broadcast_to(time, (spec["batch"],)), given["told"],
                given["null"], guidance=GUIDANCE, channels=4,
            )  # fmt: skip

        sight = samplers.Sight(predict, lambda _: given["noise"], given["anchors"])
        begin = samplers.start(sampling, given["anchors"], given["noise"])
        return samplers.run(samplers.SAMPLERS["ddim"](sampling, sight, begin))

    def decode(params, given):
        return side._module.decode(params, given["anchors"])

    side = Ours()
    return side


def their_side(spec: dict):
    """diffusers' networks and scheduler."""
    import diffusers
    import torch
    import torch_side

    class Theirs(torch_side.Side):
        def __init__(self):
            super().__init__(spec["device"])
            kind, config = {
                "img2img": (diffusers.UNet2DConditionModel, UNET),
                "decode": (diffusers.AutoencoderKL, VAE),
            }[spec["work"]]
            net = kind(**config).eval()
            tensors = {n: weight(n, tuple(t.shape)) for n, t in net.state_dict().items()}
            net.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
            layout = getattr(torch, spec["torch_layout"])
            self._net = net.to(self.device).to(memory_format=layout)
            given = {name: torch.from_numpy(x) for name, x in inputs(spec).items()}
            for name in ("anchors", "noise"):
                given[name] = given[name].permute(0, 3, 1, 2).contiguous(memory_format=layout)
            self._given = {name: x.to(self.device) for name, x in given.items()}
            self._scheduler = diffusers.DDIMScheduler(clip_sample=False, **NOISE)

        def run(self, count: int) -> None:
            with torch.no_grad():
                for _ in range(count):
                    self._last = getattr(self, f"_{spec['work']}")()
            self.wait()

        def _img2img(self) -> torch.Tensor:
            self._scheduler.set_timesteps(STEPS)
            times = self._scheduler.timesteps[STEPS - int(STEPS * STRENGTH) :]
            texts = torch.cat([self._given["null"], self._given["told"]])
            first = times[:1].repeat(spec["batch"])
            latents = self._scheduler.add_noise(self._given["anchors"], self._given["noise"], first)
            for time in times:
                both = self._net(torch.cat([latents] * 2), time, texts).sample
                null, told = both.chunk(2)
                guided = null + GUIDANCE * (told - null)
                latents = self._scheduler.step(guided, time, latents).prev_sample
            return latents

        def _decode(self) -> torch.Tensor:
            return self._net.decode(self._given["anchors"] / 0.18215).sample

        def shown(self) -> list:
            return self._last.permute(0, 2, 3, 1)[:, ::SHOWN, ::SHOWN].tolist()

    return Theirs()


def agree(workers: Any) -> dict[str, float]:
    """How far the sides' results are apart; the program ends where that is too far."""
    ours, theirs = (np.array(worker.ask("shown")) for worker in workers.values())
    found = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not found < SAME:
        sys.exit(f"the sides do not compute the same: {found:.2g} of the result's norm apart")
    return {"apart": found}


def table(rows: list[dict]) -> str:
    """The results in Markdown."""
    lines = [
        "| work | batch | ours, s | torch, s | torch / ours | by CPU time | apart |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        seconds = (row["sides"][side]["median_seconds"] for side in SIDES)
        ratios = row["ratios"]["torch"]
        lines.append(
            f"| {row['work']} | {row['batch']} x {row['size']} | "
            + " | ".join(f"{s:.3f}" for s in seconds)
            + f" | **{ratios['seconds']:.2f}** | {ratios['cpu_seconds']:.2f} "
            f"| {row['apart']:.1g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="of the latents")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--torch_layout", default="channels_last")
    given = parser.parse_args()
    if given.side:
        spec = json.loads(given.spec)
        return measuring.serve(our_side(spec) if given.side == "ours" else their_side(spec))
    machine, rows = measuring.machine(), []  # its load before ours
    for work in given.works.split(","):
        spec = {
            "device": given.device, "work": work, "batch": given.batch, "size": given.size,
            "precision": given.precision, "torch_layout": given.torch_layout,
        }  # fmt: skip
        row = measuring.compare(
            __file__, SIDES, spec, threads=given.threads, rounds=given.rounds,
            seconds=given.seconds, agree=agree,
        )  # fmt: skip
        rows.append(spec | row)
        print(f"{work}: {row['apart']:.1g} apart,", json.dumps(row["ratios"]), flush=True)
    measuring.write({"machine": machine, "rows": rows}, table(rows), given.out)


if __name__ == "__main__":
    main()
