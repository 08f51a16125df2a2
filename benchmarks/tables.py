"""Write the tables of the README and docs from benchmarks/records, and the recipe that the README quotes.

`--check` only says whether they are current.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from decoder_tables import decoder_speed_table
from grpo_tables import grpo_table
from image_tables import image_table
from posttraining_tables import batches_table, peers_table, templates_table
from ppo_pictures import ablation_table, astray_table, frontier_table, gold_table, mix_table
from preference_tables import preference_table, shared_prefix_table
from reward_tables import reward_table
from ulmfit_tables import ulmfit_table

from adapter_tables import qlora_table
from counts_tables import counts_table, memory_table, slide_audit
from encoder_tables import encoder_table
from exchange_tables import import_table
from factuality_tables import factuality_table
from feedback_tables import best_of_table, distillation_table
from moe_tables import equal_active_table, grouped_table
from recurrent_tables import length_table
from structured_tables import strategy_table, structured_tables
from translation_tables import translation_table

ROOT = Path(__file__).parent.parent


def load(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "records" / f"{name}.json").read_text())


def percent(score: dict) -> str:
    low, high = score["ci95"]
    return f"{100 * score['value']:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


def build_table() -> str:
    record = load("build_default")
    row = record["rows"][0]
    stages = {"BASE": row["scores_pretrain"], "SFT": row["scores_sft"], "DPO": row["scores_dpo"]}
    labels = {
        "known_exact": "known facts right, unseen phrasing",
        "consistency": "same answer to every phrasing",
        "over_refusal": "known facts refused",
        "invented_false": "invented names answered as if they existed",
        "heldout_exact": "facts never taught, right",
    }
    lines = [
        f"`make demo` took {row['wall_s'] / 60:.1f} minutes and {row['peak_memory_bytes'] / 1e9:.1f} GB here "
        f"(2 cores, {record['hardware']['cpu']}), of which {row['pretrain']['time_s']:.0f} s were pretraining: "
        f"{row['model']['num_params'] / 1e6:.2f} M parameters, {row['pretrain']['tokens'] / 1e6:.1f} M tokens, "
        f"{row['scores_pretrain']['bits_per_byte']['value']:.2f} bits a byte on held-out text, facts of {row['functions']:,} functions.",
        "",
        "| share of questions (95 % interval) | " + " | ".join(stages) + " |",
        "|---|" + "---|" * len(stages),
    ]
    for key, label in labels.items():
        lines.append(f"| {label} | " + " | ".join(percent(scores[key]) for scores in stages.values()) + " |")
    return "\n".join(lines)


def speed_table() -> str:
    """Return the README's table: the decoder's two sizes beside the fastest peer in fp32 and of all, and Shakespeare's characters."""
    lines = ["| measured in one run, alternating, two cores | median | Plinth against it |", "|---|---|---|"]
    for name in ("6x256", "12x512"):
        record = load(f"train_throughput_{name}")
        size = record["size"]
        label = f"pretraining {size['layers']} × {size['width']}, context {size['context']}"
        ours, *peers = record["rows"]
        fastest = [max(rows, key=rate_of) for rows in ([row for row in peers if "fp32" in row["name"]], peers)]
        for row in [ours, *(row for i, row in enumerate(fastest) if row not in fastest[:i])]:
            against = "" if row is ours else times(row["ours_over_this"])
            lines.append(f"| {label}: {row['name']} | {rate_of(row):,.0f} tokens/s | {against} |")
    for name, label in (("shakespeare_char", "to"), ("shakespeare_three_minutes", "in three minutes:")):
        if not (ROOT / "benchmarks" / "records" / f"{name}.json").exists():
            continue
        record = load(name)
        for row in record["rows"]:
            against = times(record["ratio_plain_over_ours"]) if row["name"].startswith("plain") and label == "to" else ""
            what = f"Shakespeare's characters {label} {row['loss_nats']['median']:.2f} nats: {row['name']}"
            lines.append(f"| {what} | {row['time_s']['median']:.1f} s | {against} |")
    return "\n".join(lines + generation_rows())


def rate_of(row: dict) -> float:
    return row["tokens_per_s"]["median"]


def throughput_table() -> str:
    """Return the whole table of tokens a second for docs/step_budget.md."""
    records = [load("train_throughput_6x256"), load("train_throughput_12x512")]
    lines = ["| | 6 × 256, context 256 | Plinth against it | 12 × 512, context 512 | Plinth against it |", "|---|---|---|---|---|"]
    for rows in zip(*(record["rows"] for record in records)):
        cells = [f"{rate_of(row):,.0f} | {'' if row['name'].startswith('plinth') else times(row['ours_over_this'])}" for row in rows]
        lines.append(f"| {rows[0]['name']} | " + " | ".join(cells) + " |")
    shares = ", ".join(f"{record['mfu']:.0%}" for record in records)
    return "\n".join([*lines, "", f"Tokens a second, medians. Our MFU against the measured bf16 rate of both cores: {shares}."])


def times(ratio: dict) -> str:
    return f"{ratio['median']:.1f}× ({ratio['min']:.1f}–{ratio['max']:.1f})"


def step_budget() -> str:
    """Return the tables of docs/step_budget.md."""
    parts = []
    for name in ("6x256", "12x512"):
        record, throughput = load(f"step_budget_{name}"), load(f"train_throughput_{name}")
        parts += [
            f"### {name.replace('x', ' layers of ')}",
            "",
            f"A micro-batch of {record['tokens']:,} tokens takes one core {1e3 * record['micro_batch_s']:.0f} ms. Measured here: a large "
            f"bf16 product runs at {record['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s, a large copy moves "
            f"{record['copy_bytes_per_s'] / 1e9:.1f} GB/s. "
            f"Matrix products, attention's included, are {record['matmul_share']:.0%} of the time.",
            "",
            "| part | time | share | floor | reached |",
            "|---|---|---|---|---|",
        ]
        for row in record["rows"]:
            reached = f"{row['floor_s'] / row['time_s']:.0%}" if row["floor_s"] and row["time_s"] else ""
            floor = f"{1e3 * row['floor_s']:.1f} ms" if row["floor_s"] else ""
            parts.append(f"| {row['name']} | {1e3 * row['time_s']:.1f} ms | {row['share']:.0%} | {floor} | {reached} |")
        parts += [
            "",
            f"The optimizer takes {1e3 * record['optimizer_s']:.0f} ms of both cores an update, {record['optimizer_share']:.1%} of a step "
            f"of {record['tokens_per_step']:,} tokens. The whole step on two cores, from the throughput benchmark: "
            f"{throughput['rows'][0]['tokens_per_s']['median']:,.0f} tokens a second, MFU {throughput['mfu']:.0%} of the measured rate.",
            "",
        ]
    return "\n".join(parts).rstrip()


def lifecycle() -> str:
    """Return the body of the build from the recipe, as the README quotes it."""
    source = (ROOT / "src" / "plinth" / "recipes" / "lifecycle.py").read_text()
    body = source.split("    config, stage = open_build(", 1)[1]
    return "```python\n" + textwrap.dedent("    config, stage = open_build(" + body).rstrip() + "\n```"


def gpu_tables() -> str:
    """Return the tables of docs/gpu.md, or a sentence where no GPU has been measured."""
    records = ROOT / "benchmarks" / "records"
    if not (records / "gpu_throughput.json").exists():
        return "Nothing yet: no record of a GPU lies in `benchmarks/records`. This version has been run on processors alone."
    record = load("gpu_throughput")
    gpu = record["hardware"]["gpus"][0]
    lines = [
        f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, PyTorch {record['versions']['torch']}, {record['date']}. "
        f"A large bf16 product ran at {record['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s.",
        "",
        "| size | side | tokens/s | MFU, measured rate | MFU, data sheet | first side against it |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        ratio = row["first_over_this"]
        sheet = f"{row['mfu_datasheet']:.0%}" if row["mfu_datasheet"] else ""
        lines.append(
            f"| {row['size']} | {row['name']} | {row['tokens_per_s']['median']:,.0f} | {row['mfu']:.0%} | {sheet} "
            f"| {ratio['median']:.2f}× ({ratio['min']:.2f}–{ratio['max']:.2f}) |"
        )
    if (records / "gpu_time_to_loss.json").exists():
        record = load("gpu_time_to_loss")
        lines += ["", "| training to the plain GPT's validation loss | steps | seconds | nats |", "|---|---|---|---|"]
        for row in record["rows"]:
            steps, seconds, loss = row["runs"][0]["steps"], row["time_s"]["median"], row["loss_nats"]["median"]
            lines.append(f"| {record['size']}: {row['name']} | {steps:,} | {seconds:.1f} | {loss:.3f} |")
    return "\n".join(lines)


def generation_rows() -> list[str]:
    """Return the README's rows of generation: the larger model on two threads, beside llama.cpp."""
    lines = []
    for row in load("inference_peers")["rows"]:
        peer = next((side for side in row["ours_over"] if side.startswith("llama")), None)
        if peer and (row["size"], row["threads"]) == ("124M", 2):
            ours = next(iter(row["sides"].values()))
            lines += [
                f"| generation, 124 M parameters, {row['question']}: plinth | {rate_of(ours):,.0f} tokens/s |  |",
                f"| the same: {LABELS[peer]} | {rate_of(row['sides'][peer]):,.0f} tokens/s | {times(row['ours_over'][peer])} |",
            ]
    return lines


LABELS = {
    "plinth-bf16 separately": "the same in 16 calls, each reading the prompt",
    "plinth-bf16 constrained": "the same under a JSON schema",
    "memory": "reading the weights and nothing else",
    "transformers-bf16": "transformers generate, bf16",
    "llama-bf16": "llama.cpp, bf16",
    "llama-q8_0": "llama.cpp, Q8_0",
    "llama-q4_0": "llama.cpp, Q4_0, embedding and head Q8_0",
    "llama-q4_0-pure": "llama.cpp, Q4_0 throughout",
}
WORK_ORDER = (
    "decode-1", "decode-1-8bit", "decode-1-4bit", "decode-16", "prefill-512", "beam-4", "best-of-16", "json-schema", "bandwidth",
)  # fmt: skip


def inference_rows(threads: tuple[int, ...] = (2, 1)) -> list[str]:
    """Return the rows of the table of generation, one for each side that ours was compared with."""
    lines = []
    rows = {(row["size"], row["threads"], row["workload"]): row for row in load("inference_peers")["rows"]}
    for size, count, work in ((size, count, work) for count in threads for size in ("124M", "25M") for work in WORK_ORDER):
        row = rows.get((size, count, work))
        if row is None:
            continue
        ours = next(iter(row["sides"].values()))
        for side, ratio in row["ours_over"].items():
            note = f"; texts identical in {row['identical']:.0%}" if "identical" in row else ""
            lines.append(
                f"| {row['question']}{note} | {size}, {count} | {rate_of(ours):,.0f} | {LABELS[side]} | {rate_of(row['sides'][side]):,.0f} "
                f"| {times_exact(ratio)} |"
            )
    return lines


def times_exact(ratio: dict) -> str:
    return f"{ratio['median']:.2f}× ({ratio['min']:.2f}–{ratio['max']:.2f})"


def inference_tables() -> str:
    """Return the tables of docs/inference_speed.md."""
    record = load("inference_peers")
    lines = [
        f"Tokens a second, medians; {record['hardware']['cpu']}, {record['date']}.",
        "",
        "| work | parameters, threads | Plinth | against | its rate | Plinth against it |",
        "|---|---|---|---|---|---|",
        *inference_rows(),
    ]
    masks = [side for row in record["rows"] for side in row["sides"].values() if "mask_p99_s" in side]
    if masks:
        slowest = max(masks, key=lambda side: side["mask_p99_s"])
        lines += [
            "",
            f"A mask takes {1e6 * slowest['mask_median_s']:.0f} µs, 99 of 100 at most {1e6 * slowest['mask_p99_s']:.0f} µs "
            f"({slowest['masks']} masks, the slower of the sizes).",
        ]
    if exists("inference_ttft"):
        lines += ["", *ttft_table()]
    if exists("inference_start"):
        lines += ["", "| from the command to the first token | seconds |", "|---|---|"]
        kernels = {"cold": "kernels are compiled first", "warm": "kernels lie in the cache"}
        for row in load("inference_start")["rows"]:
            lines.append(f"| `plinth generate`, {row['size']}, {kernels[row['start']]} | {row['first_token_s']['median']:.1f} |")
    return "\n".join(lines)


def ttft_table() -> list[str]:
    record = load("inference_ttft")
    lines = [
        f"{record['clients']} clients at once, {record['prefix_tokens']} tokens that they share and {record['own_tokens']} of their own:",
        "",
        "| weights, prefix | server | median to the first token | 95th percentile |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        for side, found in row["sides"].items():
            medians = f"{found['ttft_median_s']['median']:.2f} s | {found['ttft_p95_s']['median']:.2f} s |"
            lines.append(f"| {row['size']} bf16, {row['prefix']} | {side} | {medians}")
    return lines


def exists(name: str) -> bool:
    return (ROOT / "benchmarks" / "records" / f"{name}.json").exists()


def loader_table() -> str:
    rows, training = load("loader_throughput")["rows"], load("train_throughput_6x256")["rows"][0]
    lines = [
        "| documents | tokens | rows of | packing | tokens/s | first batch: step 0, step 1,000,000 "
        "| memory grown: peak, without file pages | padding |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['documents']:,} | {row['tokens_of_split'] / 1e9:.1f} G "
            f"| {row['sequences_per_step']} × {row['seq_len']} | {row['packing']} "
            f"| {row['tokens_per_s'] / 1e6:.1f} M | {row['first_batch_step_0_s']:.2f} s, {row['first_batch_step_1000000_s']:.2f} s "
            f"| {row['peak_rss_grown_bytes'] / 1e6:,.0f} MB, {row['anonymous_rss_grown_bytes'] / 1e6:,.0f} MB | {row['padding']:.4%} |"
        )
    slowest = min(row["tokens_per_s"] for row in rows if row["documents"] <= 1_000_000)
    share = training["tokens_per_s"]["median"] / slowest
    lines += [
        "",
        f"The slowest of the smaller set is {slowest / 1e6:.1f} M tokens/s, where `plinth pretrain` takes in "
        f"{training['tokens_per_s']['median']:,.0f} tokens/s of 6 × 256 on two such cores: {share:.2%} of a step.",
    ]
    return "\n".join(lines)


def weight_formats() -> str:
    """Return the tables of speed and loss by format for docs/inference.md."""
    record = load("weight_formats")
    batches = list(record["rows"][0]["tokens_per_s"])
    lines = ["| parameters, threads | format | weights | " + " | ".join(f"batch {batch}" for batch in batches) + " |"]
    lines.append("|---|---|---|" + "---|" * len(batches))
    for row in record["rows"]:
        rates = " | ".join(f"{row['tokens_per_s'][batch]['median']:,.0f}" for batch in batches)
        lines.append(f"| {row['size']}, {row['threads']} | {row['format']} | {row['weight_bytes'] / 1e6:.0f} MB | {rates} |")
    losses = record["losses"]
    lines += [
        "",
        f"Tokens a second of greedy decoding, medians ({record['hardware']['cpu']}). What rounding costs a trained model, "
        f"{losses['num_layers']} × {losses['hidden_size']}, the base model of `make demo`, "
        f"on {losses['tokens']:,} tokens of Python source:",
        "",
        "| format | loss, nats | divergence from fp32, nats | same first token |",
        "|---|---|---|---|",
    ]
    for row in losses["rows"]:
        lines.append(f"| {row['format']} | {row['loss_nats']:.4f} | {row['divergence_nats']:.5f} | {row['same_first_token']:.1%} |")
    return "\n".join(lines)


def protein_encoder() -> str:
    """Return the table of docs/proteins.md, or a sentence where nothing has been measured."""
    if not exists("protein_encoder"):
        return "Not measured yet."
    record = load("protein_encoder")
    found, row = record["summary"], record["rows"][0]

    def cell(name: str, form: str) -> str:
        values = found[name]
        return f"{format(values['median'], form)} ({format(values['min'], form)}–{format(values['max'], form)})"

    lines = [
        f"{len(record['rows'])} seeds, {row['num_params']:,} parameters, {row['sequences']:,} sequences to learn from, "
        f"{record['steps']} steps "
        f"({row['tokens'] / 1e6:.1f} M residues guessed); medians, smallest and largest.",
        "",
        "| | frequencies alone | the encoder | who knows the ancestor |",
        "|---|---|---|---|",
        f"| nats a hidden residue, held out | {cell('unigram_nats', '.2f')} | {cell('model_nats', '.2f')} "
        f"| {cell('ancestor_nats', '.2f')} |",
        "",
        "| | composition of amino acids | vectors before training | vectors after it | chance |",
        "|---|---|---|---|---|",
        f"| family of a held-out sequence by its nearest centroid | {cell('accuracy_composition', '.0%')} "
        f"| {cell('accuracy_untrained', '.0%')} | {cell('accuracy_trained', '.0%')} | {1 / record['families']:.0%} |",
    ]
    return "\n".join(lines)


def put(text: str, start: str, end: str, content: str) -> str:
    """Replace what stands between two markers."""
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


def decode_speed() -> str:
    """Return the table of the native runner's speed beside the memory's rate."""
    record = load("decode_speed")
    lines = [
        "| parameters, threads | batch 1 | batch 16 | prompt of 512 | read rate | share of it at batch 1 |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        numbers = " | ".join(f"{row[name]['median']:,.0f}" for name in ("decode 1", "decode 16", "prefill 512"))
        read, share = row["read bytes"]["median"] / 1e9, row["share of read rate"]["median"]
        lines.append(f"| {row['size']}, {row['threads']} | {numbers} | {read:.0f} GB/s | {100 * share:.0f} % |")
    return "\n".join([*lines, "", f"Tokens a second, bf16, medians ({record['hardware']['cpu']})."])


def answer_cache_table() -> str:
    """Return the table of docs/consistency.md."""
    asked = {"edited": "the same, edited", "reworded": "the same in other words", "new": "other questions"}
    rows = load("answer_cache")["rows"]
    names = " | ".join(f"{name} ({rows[0][kind]['n']}): right, wrong" for kind, name in asked.items())
    lines = [f"| `min_likeness` | {names} |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[kind]['right']:.1%}, {row[kind]['wrong']:.1%}" for kind in asked]
        lines.append(f"| {row['min_likeness']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{rows[0]['kept']} questions kept; shares of the questions asked that get an answer from the cache."])


def families_table(record: dict) -> str:
    """Return the table of docs/models.md: what each family learns in the same short time."""
    lines = ["| family | parameters | updates | a second | held-out nats | frequencies or chance alone |", "|---|---:|---:|---:|---:|---:|"]
    for row in record["rows"]:
        speed = f"{row['counted_per_s']:,.0f} {row['counted']}"
        size = f"{row['num_params'] / 1e6:.2f} M"
        lines.append(f"| {row['family']} | {size} | {row['steps']:,} | {speed} | {row['heldout_nats']:.2f} | {row['trivial_nats']:.2f} |")
    hardware = record["hardware"]
    return "\n".join([*lines, "", f"{record['seconds']:.0f} s of training each ({hardware['cpu']}, {hardware['cores']} cores)."])


def measured(name: str, table: Callable[[dict], str]) -> Callable[[], str]:
    """Return what makes a table of a record, or says that there is none yet."""
    return lambda: table(load(name)) if exists(name) else "Not measured yet."


# (page, mark, table): a page has <!-- MARK: written by benchmarks/tables.py --> and <!-- end of MARK --> around each.
SECTIONS: list[tuple[str, str, Callable[[], str]]] = [
    ("README.md", "results", lambda: f"{build_table()}\n\n{speed_table()}"),
    ("docs/gpu.md", "gpu results", gpu_tables),
    ("docs/inference.md", "decode speed", decode_speed),
    ("docs/inference.md", "weight formats", weight_formats),
    ("docs/loader.md", "results", loader_table),
    ("docs/inference_speed.md", "results", inference_tables),
    ("docs/step_budget.md", "step budget", lambda: f"{step_budget()}\n\n### Against others\n\n{throughput_table()}"),
    ("docs/ppo.md", "ppo ablations", measured("ppo_ablations", ablation_table)),
    ("docs/ppo.md", "ppo gold", measured("ppo_gold", gold_table)),
    ("docs/ppo.md", "ppo frontier", measured("ppo_frontier", frontier_table)),
    ("docs/ppo.md", "ppo astray", measured("ppo_astray", astray_table)),
    ("docs/ppo.md", "ppo mix", measured("ppo_mix", mix_table)),
    ("docs/structured_output.md", "strategies", measured("structured_strategies", strategy_table)),
    ("docs/structured_output.md", "structured output", measured("structured_output", structured_tables)),
    ("docs/consistency.md", "answer cache", answer_cache_table),
    ("docs/counts.md", "counts", counts_table),
    ("docs/counts.md", "training memory", memory_table),
    ("docs/counts.md", "slide audit", slide_audit),
    ("docs/mixture_of_experts.md", "grouped", measured("moe_grouped", grouped_table)),
    ("docs/mixture_of_experts.md", "equal active", measured("moe_equal_active", equal_active_table)),
    ("docs/models.md", "decoder speed", measured("decoder_speed", decoder_speed_table)),
    ("docs/models.md", "families", measured("families", families_table)),
    ("docs/grpo.md", "grpo arithmetic", measured("grpo_arithmetic", grpo_table)),
    ("docs/proteins.md", "protein encoder", protein_encoder),
    ("docs/preference.md", "shared prefix", measured("shared_prefix", shared_prefix_table)),
    ("docs/preference.md", "preference table", measured("preference_table", preference_table)),
    ("docs/reward_models.md", "hh-rlhf", measured("reward_model", reward_table)),
    ("docs/translation.md", "translation", translation_table),
    ("docs/encoders.md", "encoders", measured("encoder_pretraining", encoder_table)),
    ("docs/recurrent.md", "length bottleneck", measured("length_bottleneck", length_table)),
    ("docs/transfer.md", "ulmfit", measured("ulmfit", ulmfit_table)),
    ("docs/images.md", "shapes world", measured("shapes_world", image_table)),
    ("docs/ai_feedback.md", "best of n", measured("best_of_n", best_of_table)),
    ("docs/distillation.md", "distillation", measured("distillation", distillation_table)),
    ("docs/factuality.md", "factuality tuning", measured("factuality_tuning", factuality_table)),
    ("docs/adapters.md", "qlora memory", measured("qlora_memory", qlora_table)),
    ("docs/sft.md", "batches", measured("sft_packing", batches_table)),
    ("docs/sft.md", "templates", measured("chat_templates", templates_table)),
    ("docs/sft.md", "peers", measured("posttraining_peers", peers_table)),
    ("docs/exchange.md", "import speed", measured("import_speed", import_table)),
]


def main() -> int:
    pages: dict[Path, str] = {}
    for name, mark, table in SECTIONS:
        page = ROOT / name
        text = pages.get(page) or page.read_text()
        pages[page] = put(text, f"<!-- {mark}: written by benchmarks/tables.py -->", f"<!-- end of {mark} -->", table())
    readme = ROOT / "README.md"
    pages[readme] = put(pages[readme], "<!-- lifecycle -->", "<!-- end of lifecycle -->", lifecycle())
    if "--check" in sys.argv:
        return int(any(page.read_text() != current for page, current in pages.items()))
    for page, current in pages.items():
        page.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
