"""The training loop: dispatch step k, read the metrics of step k-1, never wait in between."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from flexmemory import cluster, parallel
from flexmemory.config import Config
from flexmemory.data import tokenizer as tokenizers
from flexmemory.data.pipeline import Batches, make_batches
from flexmemory.data.prefetch import prefetch
from flexmemory.data.shards import TokenShards, read_questions
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.errors import UserError
from flexmemory.evals.perplexity import make_eval_step, perplexity
from flexmemory.evals.questions import answer_accuracy, encode_questions
from flexmemory.evals.rows import RowsOf
from flexmemory.files import is_disk_full, write_json
from flexmemory.machine import peak_device_bytes, peak_rss
from flexmemory.models.accounting import account
from flexmemory.models.blocks import layer_specs
from flexmemory.models.parameters import join
from flexmemory.models.transformer import abstract_params
from flexmemory.progress import ProgressLine
from flexmemory.run_folder import Writer, claim, complete_steps, leaves, started, summary_writer
from flexmemory.train import checkpoint, trace
from flexmemory.train.clock import Clock, Work, flops
from flexmemory.train.compiled import compile_step
from flexmemory.train.host_tables import HostTables
from flexmemory.train.step import init_state, make_train_step


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is not finite. The message names the step and the last good
    checkpoint."""


class TrainingInterrupted(RuntimeError):
    """Asked to stop. The message names the step; a checkpoint of it is written and the same call
    goes on from there."""


def resolve(cfg: Config) -> tuple[Config, TokenShards, TokenShards]:
    """(config with the data's vocabulary filled in, train shards, validation shards). Raises
    UserError when they do not fit."""
    if not cfg.data.path:
        raise UserError("config data.path: empty; give a directory written by `flexmemory prepare`")
    # absolute, so that the run folder can be evaluated from anywhere
    data = dataclasses.replace(cfg.data, path=str(Path(cfg.data.path).absolute()))
    train, val = TokenShards(data.path, "train"), TokenShards(data.path, "val")
    vocab_size = cfg.model.vocab_size or train.vocab_size
    if vocab_size < train.vocab_size:
        raise UserError(
            f"config model.vocab_size: {vocab_size} is smaller than the data's vocabulary"
            f" {train.vocab_size}; set it to that or to 0"
        )
    train.num_windows(data.seq_len)  # raises when a sequence is longer than a shard
    model = dataclasses.replace(cfg.model, vocab_size=vocab_size)
    return dataclasses.replace(cfg, data=data, model=model), train, val


def train(
    cfg: Config,
    workdir: str | Path,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
    profile_steps: range | None = None,
) -> dict:
    """Trains (or resumes) a run and returns what final_result.json holds; a finished run is left as
    it is.

    ``stop`` is asked after every step (in a run of one process; several hear SIGTERM together);
    when it says so, a checkpoint is written and TrainingInterrupted raised. A profiler trace of
    ``profile_steps``, numbered from 1, goes to the run folder. Raises UserError (also when the disk
    is full) and TrainingDiverged."""
    workdir, clock = Path(workdir), Clock()
    if profile_steps is not None:
        trace.check(profile_steps, cfg.train.steps)
    with clock.span("setup"), contextlib.ExitStack() as closing:
        cfg, shards, val_shards = cluster.together(lambda: resolve(cfg))
        cluster.agree(
            {f"config {name}": value for name, value in leaves(cfg).items() if name != "data.path"}
            | {"data fingerprint": shards.fingerprint}
        )
        if mesh := parallel.make_mesh(cfg.parallel):
            parallel.check(cfg, abstract_params(cfg.model), dict(mesh.shape))
            closing.enter_context(jax.set_mesh(mesh))
        tokenizer = tokenizers.load(cfg.data.path)
        questions = read_questions(cfg.data.path)
        encode_questions(questions, tokenizer, cfg.data.seq_len)  # raises when one is too long
        if cfg.train.tensorboard:
            summary_writer()  # raises when it is not installed
        batches = make_batches(
            shards,
            seq_len=cfg.data.seq_len,
            batch_size=cfg.data.batch_size,
            seed=cfg.train.seed,
            accum=cfg.train.accum_steps,
            segments=cfg.data.document_mask,
            sections=parallel.sections(),
            own=parallel.own_sections(),
            row_sizes=None if any(spec.row_width for spec in layer_specs(cfg.model)) else (),
        )  # without rows one size does, and one compilation
        if lock := cluster.together(
            lambda: claim(workdir, cfg, shards.fingerprint, tokenizer), first_only=True
        ):
            closing.enter_context(lock)
        fact = f"workdir: the start written in {workdir} (is it on a file system that all see?)"
        cluster.agree({fact: started(workdir)})
        checkpoints = closing.enter_context(
            contextlib.closing(checkpoint.open_checkpoints(workdir, cfg.train.keep_checkpoints))
        )
        state = checkpoint.restore(checkpoints, workdir, cfg)
        start = int(state["step"]) if state else 0
        if profile_steps and start >= profile_steps[-1] and cluster.is_first():
            print(
                f"train: the run is at step {start}, past those to profile; nothing is traced",
                file=sys.stderr,
            )
        if start == cfg.train.steps and (workdir / "final_result.json").exists():
            return json.loads((workdir / "final_result.json").read_bytes())
        counts = {name: float(value) for name, value in state.pop("data").items()} if state else {}
        tables = None
        if cfg.parallel.table_memory == "host":
            tables = closing.enter_context(contextlib.closing(HostTables(cfg, state)))
            state = tables.state
        state = state or init_state(cfg)
        shown = progress and cluster.is_first()
        run = Run(cfg, workdir, val_shards, clock, checkpoints, shown, start, counts, tables)
        closing.enter_context(contextlib.closing(run))
        traced = profile_steps if profile_steps and cluster.is_first() else range(0)
        tracing = closing.enter_context(trace.Trace(workdir / "profile", traced, clock))
        closing = closing.pop_all()
    try:
        with closing:
            state = run.steps(state, batches, stop, tracing)
            return run.finish(state, tokenizer, questions)
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"workdir: {workdir}: the disk is full; make room and run the same command again"
                " to go on"
            ) from error
        raise


@dataclasses.dataclass(eq=False)
class Run:
    """One call of :func:`train`: what the loop carries besides the train state."""

    cfg: Config
    workdir: Path
    val_shards: TokenShards
    clock: Clock
    checkpoints: Any
    progress: bool
    start: int
    counts: dict[str, float]  # of earlier starts
    tables: HostTables | None

    def __post_init__(self) -> None:
        cfg, start, self.saved = self.cfg, self.start, self.start
        self.step_fn, self.eval_step = make_train_step(cfg), make_eval_step(cfg)
        # (R of all sections, C): (compiled step, its facts)
        self.compiled: dict[tuple[int, int], tuple[Any, dict]] = {}
        self.writer: Writer | None = None
        if cluster.is_first():
            self.writer = Writer(self.workdir, start, cfg.train.tensorboard)
        self.account = account(cfg.model, cfg.data.seq_len)
        self.tokens_per_step = cfg.data.batch_size * cfg.data.seq_len
        self.work = Work(self.clock, self.account, self.tokens_per_step, self.counts)

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def write(self, step: int, numbers: dict) -> None:
        if self.writer:
            self.writer.write(step, numbers)

    def steps(
        self, state: dict, batches: Batches, stop: Callable[[], bool], tracing: trace.Trace
    ) -> dict:
        """Trains from ``start`` to the end and returns the state."""
        cfg, start, steps = self.cfg.train, self.start, self.cfg.train.steps
        pending: tuple | None = None  # a step that is not logged yet
        with (
            ProgressLine("train", steps, "steps", self.progress, start=start) as line,
            prefetch(batches, start, steps, put=parallel.batch_loader()) as loaded,
        ):

            def settle() -> None:
                nonlocal pending
                if pending:
                    self._log(line, *pending)
                pending = None

            stream = self.tables.ahead(loaded) if self.tables else loaded
            for step in range(start + 1, steps + 1):
                with self.clock.span("data_wait"):
                    batch = next(stream)
                rows = batch["unique_ids"].size, batch["table_ids"].size
                if rows not in self.compiled or tracing.begins(step):
                    settle()  # so that no step's time passes for the compiler's or the profiler's
                if self.tables:
                    with self.clock.span("rows_wait"):
                        state = self.tables.rows_in(state)
                if rows not in self.compiled:
                    self._compile(line, rows, state, batch)
                run_step, _ = self.compiled[rows]
                with tracing.step(step):
                    state, metrics = run_step(state, batch)
                if self.tables:
                    self.tables.rows_out(state)
                settle()
                pending = (step, metrics, rows)
                evaluates = self._due(cfg.eval_every, step)
                saves = self._due(cfg.checkpoint_every, step)
                if evaluates or saves or tracing.ends(step):
                    # waits for the step: what is evaluated or saved must be sound, what is traced
                    # complete
                    settle()
                    if tracing.ends(step):
                        tracing.close()
                    if evaluates:
                        self._evaluate(state, step)
                    if saves:
                        self._save(state, step)
                if (stop() or cluster.preempted(step)) and step < steps:
                    settle()
                    if self.saved < step:
                        self._save(state, step)
                    with self.clock.span("checkpoint"):
                        self.checkpoints.wait()
                    raise TrainingInterrupted(
                        f"stopped after step {step}; the same command goes on from there"
                    )
            settle()
        return state

    def finish(self, state: dict, tokenizer: Tokenizer, questions: list[dict]) -> dict:
        """Final checkpoint, evaluation and result."""
        cfg, steps = self.cfg, self.cfg.train.steps
        if self.saved < steps or not complete_steps(self.workdir):
            self._save(state, steps)
        with self.clock.span("checkpoint"):
            self.checkpoints.wait()
        result = self._evaluate(state, steps)
        with self.clock.span("eval"):
            params, rows_of = self._evaluated(state)
            answers = answer_accuracy(cfg, params, tokenizer, questions, rows_of=rows_of)
        seconds = self.clock.seconds()
        final = {
            "step": steps,
            "tokens": steps * self.tokens_per_step,
            **result,
            **answers,
            **self.work.totals(steps),
            "seconds": seconds | {"total": sum(seconds.values())},
            "peak_bytes": {"device": peak_device_bytes(), "process": peak_rss()},
            "resumed_from": self.start,
            "accounting": self.account,
        }
        if cluster.is_first():
            write_json(self.workdir / "final_result.json", final)
        return final

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and step % every == 0 and step < self.cfg.train.steps

    def _evaluated(self, state: dict) -> tuple[dict, RowsOf | None]:
        return join(state["params"]), self.tables.rows_of(state) if self.tables else None

    def _compile(self, line: ProgressLine, rows: tuple[int, int], state: dict, batch: dict) -> None:
        """Compiles the step for the batch's R and C, which take a few static sizes, and writes what
        is known of all of them to compile.json."""
        text = line.text
        line.update(line.done, f"compiling for {rows[0]:,} rows")
        with self.clock.span("compile"):
            self.compiled[rows] = compile_step(self.step_fn, state, batch)
            steps = []
            for (unique, table_rows), (_, facts) in self.compiled.items():
                per_token = unique / self.tokens_per_step
                known = {"rows": unique, "table_rows": table_rows, "rows_per_token": per_token}
                counted = flops(self.account, self.tokens_per_step, per_token)
                steps.append({**known, **facts, "flops": counted})
            if cluster.is_first():
                device = jax.devices()[0].device_kind
                write_json(self.workdir / "compile.json", {"device": device, "steps": steps})
        line.update(line.done, text)
        self.work.interrupt()

    def _log(self, line: ProgressLine, step: int, metrics: dict, rows: tuple[int, int]) -> None:
        """Reads one step's metrics (this waits for that step only), checks them, and writes every
        log_every-th."""
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if bad := [
            f"{name} {numbers[name]}"
            for name in ("loss", "grad_norm", "param_norm")
            if not math.isfinite(numbers[name])
        ]:
            self.checkpoints.wait()
            good = complete_steps(self.workdir)
            raise TrainingDiverged(
                f"step {step}: {', '.join(bad)}; last good checkpoint: "
                f"{self.workdir / 'checkpoints' / str(good[-1]) if good else 'none yet'}"
            )
        self.work.count(step, rows[0])
        if step % self.cfg.train.log_every and step != self.cfg.train.steps:
            line.update(step)
            return
        text, rates = f"loss {numbers['loss']:.4f}", self.work.rates(step)
        if rates:
            text += f"  {rates['tokens_per_s']:,.0f} tokens/s  MFU " + (
                "unknown" if rates["mfu"] is None else f"{rates['mfu']:.1%}"
            )
        seconds = {f"{part}_s": value for part, value in self.clock.seconds().items()}
        self.write(step, {**numbers, **rates, "tokens": step * self.tokens_per_step, **seconds})
        line.update(step, text)

    def _evaluate(self, state: dict, step: int) -> dict:
        with self.clock.span("eval"):
            params, rows_of = self._evaluated(state)
            result = perplexity(self.cfg, params, self.val_shards, self.eval_step, rows_of=rows_of)
        result = {f"val_{name}": value for name, value in result.items()}
        self.write(step, result)
        return result

    def _save(self, state: dict, step: int) -> None:
        with self.clock.span("checkpoint"):
            if self.tables:
                self.checkpoints.wait()  # or the host would hold the tables three times
                state = self.tables.whole(state)
            checkpoint.save(self.checkpoints, step, state, self.work.counts)
        self.saved = step
