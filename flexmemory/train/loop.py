"""The training loop: dispatch step k, read the metrics of step k-1, never wait in between."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax

from flexmemory.config import Config
from flexmemory.data import tokenizer as tokenizers
from flexmemory.data.pipeline import make_batches
from flexmemory.data.prefetch import prefetch
from flexmemory.data.shards import TokenShards, read_questions
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.errors import UserError
from flexmemory.evals.perplexity import make_eval_step, perplexity
from flexmemory.evals.questions import answer_accuracy, encode_questions
from flexmemory.files import is_disk_full, write_json
from flexmemory.models.accounting import account, train_flops_per_token
from flexmemory.progress import ProgressLine
from flexmemory.train import checkpoint
from flexmemory.train.clock import Clock, peak_flops
from flexmemory.train.run import Writer, claim, summary_writer
from flexmemory.train.step import init_state, make_train_step


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is not finite. The message names the step and the last good checkpoint."""


class TrainingInterrupted(RuntimeError):
    """Asked to stop. The message names the step; a checkpoint of it is written and the same call goes on from there."""


def resolve(cfg: Config) -> tuple[Config, TokenShards, TokenShards]:
    """(config with the data's vocabulary filled in, train shards, validation shards). Raises UserError when they do not fit."""
    if not cfg.data.path:
        raise UserError("config data.path: empty; give a directory written by `flexmemory prepare`")
    # absolute, so that the run folder can be evaluated from anywhere
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=str(Path(cfg.data.path).absolute())))
    train, val = TokenShards(cfg.data.path, "train"), TokenShards(cfg.data.path, "val")
    if not cfg.model.vocab_size:
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=train.vocab_size))
    if cfg.model.vocab_size < train.vocab_size:
        raise UserError(f"config model.vocab_size: {cfg.model.vocab_size} is smaller than the data's vocabulary {train.vocab_size}; "
                        "set it to that or to 0")
    train.num_windows(cfg.data.seq_len)  # raises when a sequence is longer than a shard
    return cfg, train, val


def train(cfg: Config, workdir: str | Path, progress: bool = True, stop: Callable[[], bool] = lambda: False) -> dict:
    """Trains (or resumes) a run and returns what final_result.json holds; a finished run is left as it is.

    ``stop`` is asked after every step; when it says so, a checkpoint is written and TrainingInterrupted raised. Raises UserError
    (also when the disk is full) and TrainingDiverged.
    """
    workdir, clock = Path(workdir), Clock()
    with clock.span("setup"), contextlib.ExitStack() as closing:
        cfg, shards, val_shards = resolve(cfg)
        tokenizer = tokenizers.load(cfg.data.path)
        questions = read_questions(cfg.data.path)
        encode_questions(questions, tokenizer, cfg.data.seq_len)  # raises when one is too long
        if cfg.train.tensorboard:
            summary_writer()  # raises when it is not installed
        batches = make_batches(shards, seq_len=cfg.data.seq_len, batch_size=cfg.data.batch_size, seed=cfg.train.seed,
                               accum=cfg.train.accum_steps, segments=cfg.data.document_mask)
        closing.enter_context(claim(workdir, cfg, shards.fingerprint, tokenizer))
        checkpoints = closing.enter_context(contextlib.closing(checkpoint.open_checkpoints(workdir, cfg.train.keep_checkpoints)))
        state = checkpoint.restore(checkpoints, workdir, cfg)
        start = int(state["step"]) if state else 0
        if start == cfg.train.steps and (workdir / "final_result.json").exists():
            return json.loads((workdir / "final_result.json").read_bytes())
        counts = {name: float(value) for name, value in state.pop("data").items()} if state else {}
        state = state or init_state(cfg)
        run = closing.enter_context(contextlib.closing(Run(cfg, workdir, clock, checkpoints, progress, start, counts)))
        closing = closing.pop_all()
    try:
        with closing:
            state = run.steps(state, batches, val_shards, stop)
            return run.finish(state, val_shards, tokenizer, questions)
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"--workdir {workdir}: the disk is full; make room and run the same command again to go on") from error
        raise


class Run:
    """One call of :func:`train`: what the loop carries besides the train state."""

    def __init__(self, cfg: Config, workdir: Path, clock: Clock, checkpoints, progress: bool, start: int, counts: dict[str, float]):
        self.cfg, self.workdir, self.clock, self.checkpoints = cfg, workdir, clock, checkpoints
        self.progress, self.start, self.saved = progress, start, start
        self.step_fn, self.eval_step, self.compiled = make_train_step(cfg), make_eval_step(cfg), {}
        self.writer = Writer(workdir, start, cfg.train.tensorboard)
        self.numbers = account(cfg.model, cfg.data.seq_len)
        self.tokens_per_step = cfg.data.batch_size * cfg.data.seq_len
        self.peak = peak_flops()
        # over all starts of this run: tokens and seconds of timed steps, and the rows that all steps computed
        self.counts = {"timed_tokens": 0.0, "timed_seconds": 0.0, "rows": 0.0} | counts
        self.window = None  # (step, working seconds, rows) at the start of the interval that the next log line covers

    def close(self) -> None:
        self.writer.close()

    def steps(self, state: dict, batches, val_shards: TokenShards, stop: Callable[[], bool]) -> dict:
        """Trains from ``start`` to the end and returns the state."""
        cfg, pending = self.cfg, None
        with ProgressLine("train", cfg.train.steps, "steps", self.progress, start=self.start) as line, \
                prefetch(batches, self.start, cfg.train.steps) as stream:
            for step in range(self.start, cfg.train.steps):
                with self.clock.span("data_wait"):
                    batch = next(stream)
                run_step = self._compiled(state, batch, line)
                state, metrics = run_step(state, batch)
                if pending:
                    self._log(line, *pending)
                pending = (step + 1, metrics, batch["unique_ids"].size)
                if self._due(cfg.train.eval_every, step + 1) or self._due(cfg.train.checkpoint_every, step + 1):
                    self._log(line, *pending)  # waits for the step: an evaluation or a checkpoint must be of a sound state
                    pending = None
                    if self._due(cfg.train.eval_every, step + 1):
                        self._evaluate(state, step + 1, val_shards)
                    if self._due(cfg.train.checkpoint_every, step + 1):
                        self._save(state, step + 1)
                if stop() and step + 1 < cfg.train.steps:
                    if pending:
                        self._log(line, *pending)
                    if self.saved < step + 1:
                        self._save(state, step + 1)
                    self.checkpoints.wait()
                    raise TrainingInterrupted(f"stopped after step {step + 1}; the same command goes on from there")
            if pending:
                self._log(line, *pending)
        return state

    def finish(self, state: dict, val_shards: TokenShards, tokenizer: Tokenizer, questions: list[dict]) -> dict:
        """Final checkpoint, evaluation and result."""
        cfg, steps, counts = self.cfg, self.cfg.train.steps, self.counts
        if self.saved < steps or not checkpoint.complete_steps(self.workdir):
            self._save(state, steps)
        with self.clock.span("checkpoint"):
            self.checkpoints.wait()
        result = self._evaluate(state, steps, val_shards)
        with self.clock.span("eval"):
            answers = answer_accuracy(cfg, state["params"], tokenizer, questions)
        rate = counts["timed_tokens"] / counts["timed_seconds"] if counts["timed_seconds"] else None
        rows = counts["rows"] / (steps * self.tokens_per_step) if steps else None
        final = {
            "step": steps, "tokens": steps * self.tokens_per_step, **result, **answers, "train_tokens_per_s": rate,
            "mfu": self._mfu(rate, rows) if rate else None, "rows_per_token": rows,
            "seconds": {**self.clock.seconds, "train": self.clock.working() - self.clock.seconds["data_wait"], "total": self.clock.elapsed()},
            "resumed_from": self.start, "accounting": self.numbers,
        }
        write_json(self.workdir / "final_result.json", final)
        return final

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and step % every == 0 and step < self.cfg.train.steps

    def _compiled(self, state, batch, line: ProgressLine):
        """The train step compiled for the batch's shapes; R takes one of a few static sizes, so this compiles once or twice."""
        shapes = batch["unique_ids"].shape
        if shapes not in self.compiled:
            line.update(line.done, "compiling")
            with self.clock.span("compile"):
                self.compiled[shapes] = self.step_fn.lower(state, batch).compile()
            self.window = None
        return self.compiled[shapes]

    def _log(self, line: ProgressLine, step: int, metrics: dict, rows: int) -> None:
        """Reads one step's metrics (this waits for that step only), checks them, and writes every log_every-th."""
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if bad := [f"{name} {numbers[name]}" for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(numbers[name])]:
            self.checkpoints.wait()
            good = checkpoint.complete_steps(self.workdir)
            raise TrainingDiverged(f"step {step}: {', '.join(bad)}; last good checkpoint: "
                                   f"{self.workdir / 'checkpoints' / str(good[-1]) if good else 'none yet'}")
        now, counts = self.clock.working(), self.counts
        counts["rows"] += rows
        if self.window is None:  # the first step after a compilation starts the clock and is not timed
            self.window = (step, now, counts["rows"])
        if step % self.cfg.train.log_every and step != self.cfg.train.steps:
            line.update(step)
            return
        since, began, rows_before = self.window
        text = f"loss {numbers['loss']:.4f}"
        if step > since:
            tokens = (step - since) * self.tokens_per_step
            per_token = (counts["rows"] - rows_before) / tokens
            counts["timed_tokens"] += tokens
            counts["timed_seconds"] += now - began
            rate, mfu = tokens / (now - began), self._mfu(tokens / (now - began), per_token)
            self.window = (step, now, counts["rows"])
            numbers |= {"tokens_per_s": rate, "mfu": mfu, "rows_per_token": per_token}
            text += f"  {rate:,.0f} tokens/s  MFU " + ("unknown" if mfu is None else f"{mfu:.1%}")
        numbers |= {"tokens": step * self.tokens_per_step, "data_wait_s": self.clock.seconds["data_wait"],
                    "compile_s": self.clock.seconds["compile"]}
        self.writer.write(step, numbers)
        line.update(step, text)

    def _mfu(self, tokens_per_s: float, rows_per_token: float) -> float | None:
        """Model FLOPs really done over the device's bfloat16 peak; None on a device without a known peak. Training uses one device."""
        if self.peak is None:
            return None
        return tokens_per_s * train_flops_per_token(self.numbers, rows_per_token) / self.peak

    def _evaluate(self, state: dict, step: int, val_shards: TokenShards) -> dict:
        with self.clock.span("eval"):
            result = perplexity(self.cfg, state["params"], val_shards, self.eval_step)
        result = {f"val_{name}": value for name, value in result.items()}
        self.writer.write(step, result)
        return result

    def _save(self, state: dict, step: int) -> None:
        with self.clock.span("checkpoint"):
            checkpoint.save(self.checkpoints, step, state, self.counts)
        self.saved = step
