"""How fast is Paella here? Ours against the plain form with the same weights, side by side in one run, as ratios.

    python benchmarks/speed_paella.py                 # CPU: half width, 32x32 tokens, 8192 codes, 1 and 2 threads
    python benchmarks/speed_paella.py --compile       # also torch.compile(fullgraph=True) of network and whole step
    python benchmarks/speed_paella.py --device cuda   # the released size: 8 and 12 steps, batch 1 and 16, compiled too

The plain form (`plain/paella.py`) is what one writes down first from the paper; its weights come to ours through the
shipped converter. Times are medians over rounds in which both forms take turns; `difference` says how far apart their
results are: logits relative to the largest one, tokens drawn from the same uniforms, and chi-square per degree of
freedom for draws that are equal in law. Peak memory is what one step adds to the process that already holds the
weights, each form in a process of its own.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import VQModel
from parts.measuring import forget_peak, now, peak_on_device, process_bytes
from parts.measuring import race as take_turns
from plain import paella as plain
from torch import Tensor

from diffusers_ext.conversion.paella import convert_paella_unet
from diffusers_ext.guidance import classifier_free_guidance
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler, RenoisingDraws
from diffusers_ext.schedulers.token_sampling import discrete_renoising_step, sample_tokens

SCALE, TEMPERATURE, MASS = 5.0, 1.0, 0.2


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--c_hidden", type=int, help="deepest width; default: 640 on a CPU, 1280 (released) elsewhere")
    parser.add_argument("--down_levels", type=int, nargs="+", default=[4, 8, 16], help="blocks, finest level first")
    parser.add_argument("--condition_dim", type=int, default=1024)
    parser.add_argument("--num_codes", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=32, help="side of the token grid")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads, one table each")
    parser.add_argument("--rounds", type=int, default=5, help="each round times both forms once")
    parser.add_argument("--compile", action="store_true", help="also torch.compile(fullgraph=True); minutes on a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16], help="for whole images (accelerator)")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12], help="for whole images (accelerator)")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument(
        "--measure_memory", choices=("ours", "plain"), help=argparse.SUPPRESS
    )  # in a process of its own
    args = parser.parse_args(arguments)
    for name in ("tokens", "rounds", "num_codes", "condition_dim"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, received {getattr(args, name)}")
    on_cpu = args.device == "cpu"
    args.c_hidden = args.c_hidden or (640 if on_cpu else 1280)
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    return args


def build_plain(args: argparse.Namespace) -> plain.DenoiseUNet:
    """Random weights with residual branches that matter (their scale starts at 1e-6 in the original)."""
    torch.manual_seed(0)
    model = plain.DenoiseUNet(
        args.num_codes,
        args.c_hidden,
        c_clip=args.condition_dim,
        down_levels=tuple(args.down_levels),
        up_levels=tuple(reversed(args.down_levels)),
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, plain.ResBlock):
                module.gamma.fill_(0.1)
    return model.eval().requires_grad_(False).to(args.device, getattr(torch, args.dtype))


def build_ours(weights: dict[str, Tensor], args: argparse.Namespace) -> PaellaPipeline:
    """Our pipeline around the converted network; the tokenizer is the smallest one that fits, no step runs it."""
    unet = convert_paella_unet(weights).requires_grad_(False).to(args.device)
    levels = 3  # factor 4
    vqvae = VQModel(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        num_vq_embeddings=args.num_codes,
        latent_channels=4,
        norm_num_groups=4,
    ).to(args.device)
    scheduler = DiscreteRenoisingScheduler(num_vec_classes=args.num_codes, typical_mass=MASS)
    pipe = PaellaPipeline(vqvae, None, None, unet, scheduler, default_sample_size=args.tokens)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(args: argparse.Namespace, batch_size: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens (b, h, w) and condition (b, d)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(args.num_codes, (batch_size, args.tokens, args.tokens), generator=generator)
    condition = torch.randn(batch_size, args.condition_dim, generator=generator)
    return tokens.to(args.device), condition.to(args.device, getattr(torch, args.dtype))


def race(first: Callable[[], object], second: Callable[[], object], args: argparse.Namespace) -> list[float]:
    """Median seconds of both."""
    return [statistics.median(times) for times in take_turns(first, second, rounds=args.rounds, device=args.device)]


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.float() - reference.float()).abs().max() / reference.float().abs().max())


def different(ours: Tensor, reference: Tensor) -> str:
    return f"{int((ours != reference).sum())} of {ours.numel()} tokens"


@torch.no_grad()
def cases(model: plain.DenoiseUNet, pipe: PaellaPipeline, args: argparse.Namespace):
    """(name, plain form, our form, difference) of everything that is timed on one step."""
    tokens, condition = inputs(args)
    null, r = torch.zeros_like(condition), torch.zeros(1, device=args.device)
    uniforms = torch.rand(tokens.numel(), args.num_codes, device=args.device)
    logits_cond, logits_null = model(tokens, condition, r).float(), model(tokens, null, r).float()
    scheduler = pipe.scheduler
    scheduler.set_timesteps(1, device=args.device)

    def plain_network() -> Tensor:
        return model(tokens, condition, r)

    def our_network() -> Tensor:
        return pipe.unet(tokens, 0.0, condition, return_dict=False)[0]

    yield (
        "network, one forward",
        plain_network,
        our_network,
        f"{relative(our_network(), plain_network()):.1e}",
    )

    def plain_tail() -> Tensor:
        return plain.draw_tokens(logits_cond, logits_null, SCALE, TEMPERATURE, MASS, uniforms)

    def our_tail() -> Tensor:
        logits = classifier_free_guidance(logits_cond, logits_null, SCALE)
        return scheduler.step(
            logits,
            0.0,
            tokens,
            initial_noise=tokens,
            draws=RenoisingDraws(gumbel_uniforms=uniforms),
            return_dict=False,
        )[0]

    def plain_tail_with_draws() -> Tensor:
        return plain.draw_tokens(logits_cond, logits_null, SCALE, TEMPERATURE, MASS, torch.rand_like(uniforms))

    def our_tail_with_draws(scheduler: DiscreteRenoisingScheduler) -> Tensor:
        logits = classifier_free_guidance(logits_cond, logits_null, SCALE)
        return scheduler.step(logits, 0.0, tokens, initial_noise=tokens, return_dict=False)[0]

    yield "tail: guidance, filter, Gumbel draw", plain_tail, our_tail, different(our_tail(), plain_tail())
    multinomial = DiscreteRenoisingScheduler.from_config(scheduler.config, sampling="multinomial")
    multinomial.set_timesteps(1, device=args.device)
    yield (
        "tail, draws included, `multinomial`",
        plain_tail_with_draws,
        lambda: our_tail_with_draws(multinomial),
        f"chi-square {chi_square(logits_cond):.2f}",
    )

    def plain_step() -> Tensor:
        return plain.sample(model, condition, tokens, steps=1, scale=SCALE, temperature=TEMPERATURE, mass=MASS)

    def our_step() -> Tensor:
        return pipe(
            prompt_embeds=condition, latents=tokens, num_inference_steps=1, guidance_scale=SCALE, output_type="latent"
        ).images

    yield "one CFG step, tokens to tokens", plain_step, our_step, compare_steps(model, pipe, args)


@torch.no_grad()
def compare_steps(model: plain.DenoiseUNet, pipe: PaellaPipeline, args: argparse.Namespace) -> str:
    """Tokens of one whole step of both forms from the same uniforms."""
    tokens, condition = inputs(args)
    r, null = torch.zeros(1, device=args.device), torch.zeros_like(condition)
    uniforms = torch.rand(tokens.numel(), args.num_codes, device=args.device)
    logits_cond, logits_null = model(tokens, condition, r).float(), model(tokens, null, r).float()
    expected = plain.draw_tokens(logits_cond, logits_null, SCALE, TEMPERATURE, MASS, uniforms)
    pipe._guidance_scale = SCALE
    logits = pipe._predict(tokens, torch.zeros((), device=args.device), condition, null).float()
    pipe.scheduler.set_timesteps(1, device=args.device)
    drawn = pipe.scheduler.step(
        logits, 0.0, tokens, initial_noise=tokens, draws=RenoisingDraws(gumbel_uniforms=uniforms), return_dict=False
    )[0]
    difference = relative(logits, torch.lerp(logits_null, logits_cond, SCALE))
    return f"{difference:.1e}, {different(drawn, expected)}"


def chi_square(logits: Tensor, draws: int = 20_000) -> float:
    """Chi-square per degree of freedom of the two-level draw against the softmax of the likeliest codes of one row."""
    row = logits[0, :, 0, 0].float().cpu()
    p = row.softmax(0)
    top = p.argsort(descending=True)[:50]
    generator = torch.Generator().manual_seed(2)
    uniforms = torch.rand(draws, 2, generator=generator)
    drawn = sample_tokens(row.expand(draws, -1), uniforms, sampling="inverse_cdf")
    counts = torch.bincount(drawn, minlength=len(p)).double()
    observed = torch.cat([counts[top], (draws - counts[top].sum())[None]])
    expected = draws * torch.cat([p[top].double(), (1 - p[top].double().sum())[None]])
    return float(((observed - expected) ** 2 / expected).sum() / (len(observed) - 1))


class WholeStep(torch.nn.Module):
    """One guided step from tokens to tokens as a pure tensor function: draws come in, no host synchronisation."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, tokens: Tensor, r: Tensor, conditions: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens (b, h, w), r (1,), null and condition (2b, d), uniforms (b*h*w, v) -> (b, h, w)."""
        features = self.unet.forward_features(torch.cat([tokens, tokens]), r, conditions)
        null, cond = features.float().chunk(2)
        logits = self.unet.head(classifier_free_guidance(cond, null, SCALE).to(features.dtype))
        return discrete_renoising_step(logits, uniforms, TEMPERATURE, typical_mass=MASS)[0]


@torch.no_grad()
def compiled_cases(pipe: PaellaPipeline, args: argparse.Namespace):
    """The network and a whole step, eager against one compiled graph."""
    tokens, condition = inputs(args)
    r, conditions = torch.zeros(1, device=args.device), torch.cat([torch.zeros_like(condition), condition])
    uniforms = torch.rand(tokens.numel(), args.num_codes, device=args.device)
    network = torch.compile(pipe.unet, fullgraph=True)
    eager, compiled = (
        lambda: pipe.unet(tokens, r, condition, return_dict=False)[0],
        lambda: network(tokens, r, condition, return_dict=False)[0],
    )
    yield "network: compiled against eager", eager, compiled, f"{relative(compiled(), eager()):.1e}"
    step = WholeStep(pipe.unet)
    graph = torch.compile(step, fullgraph=True)
    yield (
        "whole step: compiled against eager",
        lambda: step(tokens, r, conditions, uniforms),
        lambda: graph(tokens, r, conditions, uniforms),
        different(graph(tokens, r, conditions, uniforms), step(tokens, r, conditions, uniforms)),
    )


def report(title: str, rows: list[dict]) -> None:
    print(f"\n{title}\n\n| case | plain | ours | ours / plain | difference |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['case']} | {row['plain']} | {row['ours']} | {row['ratio']:.2f} | {row['difference']} |",
            flush=True,
        )


def time_cases(found, args: argparse.Namespace) -> list[dict]:
    rows = []
    for name, first, second, difference in found:
        with torch.no_grad():
            plain_seconds, our_seconds = race(first, second, args)
        rows.append(
            {
                "case": name,
                "plain": f"{1000 * plain_seconds:.1f} ms",
                "ours": f"{1000 * our_seconds:.1f} ms",
                "ratio": our_seconds / plain_seconds,
                "difference": difference,
            }
        )
        print(f"  {name}: {rows[-1]['ratio']:.2f}", file=sys.stderr, flush=True)
    return rows


def measure_memory(args: argparse.Namespace) -> int:
    """Bytes that one guided step adds at its peak to the process that holds the weights of one form."""
    torch.set_num_threads(args.threads[0])
    tokens, condition = inputs(args)
    model = build_plain(args)
    pipe = build_ours(model.state_dict(), args)
    if args.measure_memory == "ours":
        del model

    def step() -> None:
        if args.measure_memory == "plain":
            plain.sample(model, condition, tokens, steps=1, scale=SCALE, temperature=TEMPERATURE, mass=MASS)
        else:
            pipe(
                prompt_embeds=condition,
                latents=tokens,
                num_inference_steps=1,
                guidance_scale=SCALE,
                output_type="latent",
            )

    if args.device != "cpu":
        return peak_on_device(step)
    forget_peak()
    before = process_bytes("VmRSS")
    step()
    return process_bytes("VmHWM") - before


def memory_row(args: argparse.Namespace) -> dict:
    """Both forms, each in a fresh process, so that neither lives on what the other has allocated."""
    options = [
        "--c_hidden", str(args.c_hidden), "--condition_dim", str(args.condition_dim),
        "--num_codes", str(args.num_codes), "--tokens", str(args.tokens), "--threads", str(args.threads[0]),
        "--device", args.device, "--dtype", args.dtype, "--down_levels", *map(str, args.down_levels),
    ]  # fmt: skip
    peaks = {}
    for form in ("plain", "ours"):
        command = [sys.executable, __file__, "--measure_memory", form, *options]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            raise RuntimeError(f"measuring the memory of the {form} form failed:\n{answer.stderr}")
        peaks[form] = int(answer.stdout.split()[-1])
    return {
        "case": "peak memory of a CFG step above the weights",
        "plain": f"{peaks['plain'] / 2**20:.0f} MiB",
        "ours": f"{peaks['ours'] / 2**20:.0f} MiB",
        "ratio": peaks["ours"] / peaks["plain"],
        "difference": "-",
    }


# ---------------------------------------------------------------------------------------------------------------------
# whole images on an accelerator


def measured_limits(device: str) -> tuple[float, float]:
    """(FLOP/s of a large bf16 matrix product, bytes/s of a large copy) on this device."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    big = torch.empty(2**31, device=device, dtype=torch.uint8)
    target = torch.empty_like(big)

    def best(function: Callable[[], object]) -> float:
        times = []
        for _ in range(10):
            started = now(device)
            function()
            times.append(now(device) - started)
        return min(times[2:])

    return 2 * 8192**3 / best(lambda: a @ a), 2 * big.numel() / best(lambda: target.copy_(big))


def floor_seconds(
    pipe: PaellaPipeline, args: argparse.Namespace, batch_size: int, limits: tuple[float, float]
) -> float:
    """What one guided forward cannot be faster than here: its FLOP, or one read of its weights."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens, condition = inputs(args, 2 * batch_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.unet(tokens, 0.0, condition)
    size = sum(parameter.numel() * parameter.element_size() for parameter in pipe.unet.parameters())
    return max(counter.get_total_flops() / limits[0], size / limits[1])


@torch.no_grad()
def whole_images(model: plain.DenoiseUNet, pipe: PaellaPipeline, args: argparse.Namespace) -> list[dict]:
    """Tokens of whole images: eager, compiled, and compiled into CUDA graphs, against the plain form and the floor."""
    limits = measured_limits(args.device)
    print(f"measured on this device: {limits[0] / 1e12:.0f} TFLOP/s (bf16 matmul), {limits[1] / 1e12:.2f} TB/s (copy)")
    rows = []
    for batch_size in args.batch_sizes:
        floor = floor_seconds(pipe, args, batch_size, limits)
        tokens, condition = inputs(args, batch_size)
        conditions = torch.cat([torch.zeros_like(condition), condition])
        step = WholeStep(pipe.unet)
        forms = {
            "eager": step,
            "compiled": torch.compile(step, fullgraph=True),
            "CUDA graphs": torch.compile(step, fullgraph=True, mode="reduce-overhead"),
        }
        for steps in args.steps:

            def run_plain(tokens=tokens, condition=condition, steps=steps) -> Tensor:
                return plain.sample(model, condition, tokens, steps=steps, scale=SCALE, mass=MASS)

            def run_pipeline(tokens=tokens, condition=condition, steps=steps) -> Tensor:
                return pipe(
                    prompt_embeds=condition,
                    latents=tokens,
                    num_inference_steps=steps,
                    guidance_scale=SCALE,
                    output_type="latent",
                ).images

            def run_steps(form, tokens=tokens, conditions=conditions, steps=steps) -> Tensor:
                initial = tokens
                for i in range(steps):
                    r = torch.full((1,), i / steps, device=args.device)
                    uniforms = torch.rand(tokens.numel(), args.num_codes, device=args.device)
                    tokens = form(tokens, r, conditions, uniforms).clone()  # a graph's output buffer is used again
                    if i < steps - 1:
                        tokens = plain.add_noise(tokens, (i + 1) / steps, initial)
                return tokens

            runs = {"pipeline": run_pipeline}
            runs |= {name: (lambda form=form: run_steps(form)) for name, form in forms.items()}
            for name, run in runs.items():
                plain_seconds, our_seconds = race(run_plain, run, args)
                rows.append(
                    {
                        "case": f"batch {batch_size}, {steps} steps, {name}",
                        "plain": f"{1000 * plain_seconds:.1f} ms",
                        "ours": f"{1000 * our_seconds:.1f} ms",
                        "ratio": our_seconds / plain_seconds,
                        "difference": f"{our_seconds / (steps * floor):.1f} x the floor",
                    }
                )
                print(f"  {rows[-1]['case']}: {rows[-1]['ratio']:.2f}", file=sys.stderr, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.measure_memory:
        print(measure_memory(args))
        return
    model = build_plain(args)
    pipe = build_ours(model.state_dict(), args)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Paella v1, {count:,} parameters, {args.tokens}x{args.tokens} tokens, {args.num_codes} codes, {args.dtype} on"
        f" {args.device}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    tables: dict[str, list[dict]] = {}
    for threads in args.threads if args.device == "cpu" else [0]:
        title = "one step"
        if threads:
            torch.set_num_threads(threads)
            title = f"{threads} thread{'s' if threads > 1 else ''}"
        rows = time_cases(cases(model, pipe, args), args)
        rows.append(memory_row(argparse.Namespace(**{**vars(args), "threads": [threads or 1]})))
        if args.compile:
            rows += time_cases(compiled_cases(pipe, args), args)
        report(title, rows)
        tables[title] = rows
    if args.device != "cpu":
        rows = whole_images(model, pipe, args)
        report("whole images, batch and steps (last column: time over the measured floor)", rows)
        tables["whole images"] = rows
    if args.json:
        Path(args.json).write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
