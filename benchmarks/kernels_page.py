"""The page of benchmarks/kernels.py: tables of its results, what is ahead and what behind, and claims to be matched."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

SECTIONS = {
    "Optimizers": "adamw clip+adamw lamb",
    "LayerNorm": "layer_norm",
    "Softmax": "softmax",
    "Causal scaled softmax": "causal",
}
NOTES = {
    "Optimizers": """
float32 but where it is said. Bytes: 28 a param for adamw, which reads params, gradients and two moments and writes all
but gradients; 26 with bfloat16 gradients; 18 with bfloat16 moments too; 14.06 with 8-bit moments, params float32 or
split into bfloat16 ones and their lower halves; 32 with a clip by global norm, which reads gradients once more; 40 for
lamb, which reads its step's arrays once more, as it scales each leaf by norms of params and step. XLA: Optax, under one
jit; of moments that Optax does not have, the op's own XLA form.
""",
    "LayerNorm": """
scale and bias in float32, no residual; the backward pass gives dx, dscale and dbias. Bytes: x read and y written
forward; x and dy read, dx written backward; as the peers count them also scale, bias and their gradients, in x's
dtype, and a mean and a deviation a row, in float32. XLA: the op's own XLA form, whose backward pass, like the kernel's,
is given what the forward pass saved.
""",
    "Softmax": """
Bytes: x read and y written forward; y and dy read, dx written backward. XLA: the op's own XLA form, whose
backward pass, like the kernel's, is given y, or autodiff of `softmax_reference` from x where that is faster.
""",
    "Causal scaled softmax": """
scale 0.125. Bytes: as softmax, but the masked half is not read; it is written, as zeros. XLA: the op's own
XLA form. Of the peers Triton's forward skips the masked half, the others read it.
""",
}
METHOD = """
* us: device time of a call by the profiler, the sum of its kernels', a median over calls. Gaps between kernels are not
  in it; launches, which cause them, stand beside it. Calls take turns over copies of their arguments, 240 MB and more
  in all, and keep their results: none finds its own in the L2. Optimizers keep one state.
* GB/s: of the bytes that an op cannot do without. A copy, `x + 1` in place over 2 GiB, has {ceiling} GB/s in this run;
  a kernel that reads more than it writes can be faster than a copy.
* over XLA, over it: how many times as fast as XLA in this run, as the best recorded peer. Below 1 is behind.
* Peers: {peers}
  A graph's gaps between kernels are in their times: about 1 us a kernel, of note in the smallest cases.
* runs: what is chosen where nothing is asked for: `mosaic`, the kernel, or `xla`, XLA's form of the op.
"""
CLAIMS = """
How many times as fast as PyTorch's unfused ops its kernels are said to be, and ours are. torch's times are the recorded
ones, of its eager kernels in a CUDA graph. torch has no LAMB: the passes that its foreach ops would make, 116 bytes a
param, are timed in this run, over one array.
"""
XLA = ("xla", "autodiff")


def fastest(row: Row, *keys: str) -> dict[str, Any]:
    """What was measured of the fastest of some implementations; nothing where none was timed."""
    timed = [row["times"][key] for key in keys if key in row["times"]]
    return min(timed, key=lambda measured: measured["us"], default={})


def us(row: Row, *keys: str) -> float | None:
    """Microseconds of the fastest of some implementations."""
    return fastest(row, *keys).get("us")


def best_peer(row: Row) -> tuple[str, float] | None:
    """The fastest recorded peer and its microseconds."""
    peers = {name: figures["us"] for name, figures in row["peers"].items()}
    return min(peers.items(), key=lambda item: item[1]) if peers else None


def ratios(row: Row) -> dict[str, float]:
    """How many times as fast as XLA, and as the best peer, ours is, where both were timed."""
    mine, peer = us(row, "zerojax"), best_peer(row)
    others = {"xla": us(row, *XLA), "peer": peer and peer[1]}
    return {name: other / mine for name, other in others.items() if mine and other}


def short(row: Row) -> str:
    """A row as a line for a terminal."""
    name = row["name"]
    for word, short_word in {
        "layer_norm": "ln", "bfloat16": "bf16", "float32": "f32",
        "forward": "fwd", "backward": "bwd",
    }.items():  # fmt: skip
        name = name.replace(word, short_word)
    mine = us(row, "zerojax")
    if mine is None:
        return f"{name:29s} failed"
    speeds = "".join(f" {other} {ratio:.2f}x" for other, ratio in ratios(row).items())
    return f"{name:29s}{mine:8.1f}us {row['floor_bytes'] / mine / 1e3:5.0f}GB/s{speeds}"


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """How many times as fast as PyTorch's unfused ops DeepSpeed's kernels are said to be, and what ours are."""
    by_name = {row["name"]: row for row in rows}
    found = []

    def add(claim: str, wanted: float, names: list[str], theirs: Any) -> None:
        held = [by_name.get(name) for name in names]
        mine = [us(row, "zerojax") for row in held if row]
        if len(mine) < len(names) or None in mine:
            return
        other, own = sum(map(theirs, held)), sum(mine)
        found.append(
            {
                "claim": claim,
                "theirs, us": round(other, 1),
                "ours, us": round(own, 1),
                "wanted": f"{wanted}x",
                "measured": f"{other / own:.2f}x",
                "": "met" if other / own >= wanted else "missed",
            }
        )

    recorded = lambda peer: lambda row: row["peers"][peer]["us"]
    add("AdamW, 1.3B, torch foreach", 3.4, ["adamw/1.3B"], recorded("torch foreach"))
    unfused = lambda row: us(row, "unfused")
    if by_name.get("lamb/1.3B") and unfused(by_name["lamb/1.3B"]):
        add("LAMB, 1.3B, unfused passes", 2.0, ["lamb/1.3B"], unfused)
    for row in rows:
        op, *rest = row["name"].split("/")
        if "torch" not in row["peers"]:
            continue
        if op == "layer_norm" and rest[-1] == "forward+backward":
            wanted = 3.0 if rest[:2] == ["65536x1024", "bfloat16"] else 2.0
            add(f"LayerNorm, forward + backward, {rest[0]}, {rest[1]}", wanted, [row["name"]], recorded("torch"))
        if op == "softmax" and rest[-1] == "forward" and int(rest[0].split("x")[1]) >= 4096:
            both = [row["name"], row["name"].replace("forward", "backward")]
            add(f"softmax, forward + backward, {rest[0]}, {rest[1]}", 2.0, both, recorded("torch"))
    return found


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Lines of one set of columns, as Markdown."""
    if not lines:
        return ["Not measured in this run."]
    head = ["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(lines[0])]
    return head + ["| " + " | ".join(map(str, line.values())) + " |" for line in lines]


def cells(row: Row, ceiling: float) -> dict[str, Any]:
    """A row of results as columns."""
    op, what, *more = row["name"].split("/")
    shown = (
        {"shape": what, "dtype": more[0], "pass": more[1], "runs": row["runs"]} if more else {"op": op, "leaves": what}
    )
    mine, peer, ratio = us(row, "zerojax"), best_peer(row), ratios(row)
    rate = row["floor_bytes"] / mine / 1e3 if mine else None
    times = lambda key: f"{ratio[key]:.2f}x" if key in ratio else ""
    return {
        **shown,
        "us": mine or "failed",
        "GB/s": round(rate) if rate else "",
        "of a copy": f"{rate / ceiling:.1%}" if rate else "",
        "launches": fastest(row, "zerojax").get("launches", ""),
        "XLA, us": us(row, *XLA) or ("failed" if "xla" in row["errors"] else ""),
        "XLA launches": fastest(row, *XLA).get("launches", ""),
        "over XLA": times("xla"),
        "best peer, us": f"{peer[0]} {peer[1]}" if peer else "",
        "over it": times("peer"),
    }


def behind(rows: list[Row], other: str) -> str:
    """In words: how often ours is no slower than `other`, and where it is behind."""
    themselves = lambda row: row["runs"] == other  # two programs of XLA's, which differ by noise
    known = {row["name"]: ratios(row)[other] for row in rows if other in ratios(row) and not themselves(row)}
    late = sorted((ratio, name) for name, ratio in known.items() if ratio < 1)
    where = "; behind in: " + ", ".join(f"{name} {ratio:.2f}x" for ratio, name in late) if late else ""
    return f"{len(known) - len(late)} of {len(known)}{where}."


def markdown(results: dict[str, Any]) -> str:
    """The page under results/."""
    rows, versions = results["rows"], ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    met = sum(claim[""] == "met" for claim in results["claims"])
    lines = [
        f"# Fused kernels on one {results['device']}, {results['date']}",
        "",
        f"`{results['command']}` at commit {results['commit']}; {versions}; {results['platform']}.",
        "",
        METHOD.format(**results).strip(),
        "",
        "## Wins and losses",
        "",
        f"* As fast as XLA, or faster, in {behind(rows, 'xla')}",
        f"* As fast as the best recorded peer, or faster, in {behind(rows, 'peer')}",
        f"* DeepSpeed's claims: {met} of {len(results['claims'])} met.",
    ]
    for title, ops in SECTIONS.items():
        chosen = [row for row in rows if row["name"].replace("/", " ").split()[0] in ops.split()]
        lines += ["", f"## {title}", "", NOTES[title].strip(), ""]
        lines += table([cells(row, results["ceiling"]) for row in chosen])
    lines += [
        "",
        "## DeepSpeed's claims",
        "",
        CLAIMS.strip(),
        "",
        *table(results["claims"]),
    ]
    return "\n".join(lines) + "\n"
