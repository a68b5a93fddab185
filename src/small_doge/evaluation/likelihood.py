"""A model for lm-evaluation-harness that gives the results of its own ``HFLM`` in a fraction of the time.

    lm = HarnessModel(load_model(folder), load_tokenizer(folder))
    results = lm_eval.simple_evaluate(lm, tasks=["hellaswag"], num_fewshot=5)

What is shared between requests is computed once (``likelihood_plan``), and only what predicts a continuation meets the
output head (``likelihood_score``). Where tokens begin and end, what is cut off and what counts as greedy is as in HFLM:
log-likelihoods agree to 1e-4 in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from ..errors import UserError

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        configure_pad_token,
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
        resolve_max_length,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f"lm-eval 0.4.13 or newer is needed ({error}); pip install 'small-doge[eval]'") from error

from .likelihood_generate import Generator, Prompt
from .likelihood_plan import sequences_of
from .likelihood_score import Scorer

OnResult = Callable[[int, Instance, Any], None]
MAX_GEN_TOKS = 256  # HFLM's, where a task does not say
ENCODED_AT_ONCE = 1024


class HarnessModel(TemplateLM):
    """A causal language model and its tokenizer, as lm-evaluation-harness asks them.

    Args:
        model: any transformers causal language model, put into eval mode; Doge of ours or another.
        tokenizer: its tokenizer; gets a pad token, if it has none, as HFLM gives it one.
        max_length: the most tokens that the model reads at once; by default as HFLM finds it, in the configuration.
            What is longer loses tokens on the left.
        tokens_per_batch: input tokens per call of the model, padding included; by default 2,048 on a CPU and 32,768
            elsewhere. Lower it if memory runs out.
        device: where to run; None leaves the model where it is.
        autocast: run under autocast in this dtype, such as ``torch.bfloat16``.
        add_bos_token: whether texts begin with the BOS token; None leaves it to the tokenizer.
        chat_template_args: further arguments of the tokenizer's chat template.
        progress: show one bar for each kind of requests, with the time left.
        on_result: called with (index, request, result) as soon as a request has its result, which is not in their
            order; index is the request's place in the list that was passed. A caller that stores them can start again
            with the requests that are missing. It may be set and changed at any time.

    Attributes:
        truncated: requests so far that lost tokens on the left.
        longest: tokens of the longest request so far, context and continuation, before anything was cut.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        device: Any = None,
        autocast: torch.dtype | None = None,
        add_bos_token: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        progress: bool = True,
        on_result: OnResult | None = None,
    ):
        super().__init__()
        for name, value in (("max_length", max_length), ("tokens_per_batch", tokens_per_batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.model = (model if device is None else model.to(device)).eval()
        self.tokenizer = configure_pad_token(tokenizer, model_config=model.config)
        self.max_length = max_length or resolve_max_length(model.config, tokenizer)
        self.add_bos_token, self.chat_template_args = add_bos_token, chat_template_args or {}
        self.progress, self.on_result = progress, on_result
        self.truncated = self.longest = 0
        self.scorer = Scorer(self.model, autocast, tokens_per_batch)
        self._device = self.scorer.device
        self.generator = Generator(self.model, self.tokenizer, autocast, 2 * self.scorer.tokens_per_batch)

    # What the harness asks about the tokenizer

    @property
    def eot_token_id(self) -> int:
        """The EOS token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or EOS if there is none."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def _prefix_text(self) -> str | None:
        return None if self.prefix_token_id is None else self.tok_decode(self.prefix_token_id, False)

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer or its folder, with ``__`` for each slash."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's template writes it; without system messages if it takes none."""
        from jinja2.exceptions import TemplateError

        options = self.chat_template_args | {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        options["continue_final_message"] = not add_generation_prompt
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(others, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a BOS token is added as the tokenizer does it, but not to a text that begins with one."""
        return self._encode([string], add_special_tokens, self._prefix_text)[0].tolist()

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    # What the harness asks of the model

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(context, continuation) → log-probability of the continuation, and whether greedy decoding gives it."""
        texts = [request.args for request in requests]
        with self._reporter("loglikelihood", requests, disable_tqdm) as report:
            return self._score(self._encode_pairs(texts), report)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """(text,) → log-probability of all of it, in windows that HFLM cuts alike."""
        pairs, owners = [], []
        for owner, ids in enumerate(self._encode([request.args[0] for request in requests], bos=self._prefix_text)):
            for window in get_rolling_token_windows(ids.tolist(), self.prefix_token_id, self.max_length, context_len=1):
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        missing = [0] * len(requests)
        for owner in owners:
            missing[owner] += 1
        sums = [0.0] * len(requests)
        with self._reporter("loglikelihood_rolling", requests, disable_tqdm) as report:
            for owner, windows in enumerate(missing):
                if not windows:
                    report(owner, 0.0)
            for window, nats, _ in self.scorer.run(sequences_of(pairs, self.max_length)):
                owner = owners[window]
                sums[owner] += nats
                missing[owner] -= 1
                if not missing[owner]:
                    report(owner, sums[owner])
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """(context, options) → the text that follows, up to the first of the strings in ``options["until"]``.

        Raises:
            ValueError: if ``max_gen_toks`` leaves no room for a context, or for ``max_length`` among the options.
        """
        results = [""] * len(requests)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False) if self.eot_token_id is not None else None
        contexts = self._encode([request.args[0] for request in requests], bos=self.tokenizer.bos_token)
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True, default=repr), []).append(index)
        with self._reporter("generate_until", requests, disable_tqdm) as report:
            for indices in by_options.values():
                options: dict[str, Any] = dict(normalize_gen_kwargs(requests[indices[0]].args[1], MAX_GEN_TOKS))
                until = handle_stop_sequences(options.pop("until", None), eos=eos)
                room = self.max_length - options["max_gen_toks"]
                if room < 1 or "max_length" in options:
                    raise ValueError(
                        f"options {requests[indices[0]].args[1]} of generate_until: expected max_gen_toks below the "
                        f"model's {self.max_length} tokens, and no max_length"
                    )
                for index in indices:
                    self._count(len(contexts[index]), room)
                prompts = [Prompt(index, contexts[index][-room:].tolist()) for index in indices]
                for index, ids in self.generator.run(prompts, until, options.pop("max_gen_toks"), options):
                    results[index] = postprocess_generated_text(self.tok_decode(ids), until, None)
                    report(index, results[index])
        return results

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    # How

    def _score(
        self, pairs: Sequence[tuple[ArrayLike, ArrayLike]], report: Callable[[int, Any], None] | None = None
    ) -> list[tuple[float, bool]]:
        for context, continuation in pairs:
            self._count(np.size(context) + np.size(continuation), self.max_length + 1)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for index, nats, greedy in self.scorer.run(sequences_of(pairs, self.max_length)):
            results[index] = nats, greedy
            if report is not None:
                report(index, results[index])
        return results

    def _count(self, length: int, room: int) -> None:
        self.longest = max(self.longest, length)
        self.truncated += length > room

    def _encode_pairs(self, texts: list[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(context, continuation) → token ids of both, split as ``TemplateLM`` splits them.

        Text is encoded as a whole and cut where the context alone would end, without the blanks at its end. Contexts
        come more than once and are encoded once.
        """
        alone = [continuation for context, continuation in texts if not context]
        wholes = [context + continuation for context, continuation in texts if context]
        contexts = list(dict.fromkeys(context.rstrip() for context, _ in texts if context))
        encoded = dict(zip(contexts, self._encode(contexts, bos=self._prefix_text), strict=True))
        next_alone = iter(self._encode(alone, add_special_tokens=False))
        next_whole = iter(self._encode(wholes, bos=self._prefix_text))
        pairs = []
        for context, _ in texts:
            if context:
                ids = encoded[context.rstrip()]
                pairs.append((ids, next(next_whole)[len(ids) :]))
            else:
                ids = next(next_alone)
                # A text that begins with BOS brings its own context.
                own = len(ids) and ids[0] == self.prefix_token_id
                pairs.append((ids[:1], ids[1:]) if own else (np.array([self.prefix_token_id], dtype=np.int32), ids))
        return pairs

    def _encode(
        self, strings: Sequence[str], add_special_tokens: bool | None = None, bos: str | None = None
    ) -> list[np.ndarray]:
        """Token ids of each string, by the tokenizer's threads.

        Args:
            add_special_tokens: None: as the tokenizer or ``add_bos_token`` says, False for what begins with ``bos``.
        """
        encoded = [np.zeros(0, dtype=np.int32)] * len(strings)
        begins = [add_special_tokens is None and has_bos_prefix(string, bos) for string in strings]
        added = self.add_bos_token if add_special_tokens is None else add_special_tokens
        for with_bos in (False, True):
            choice = False if with_bos else added
            options = {} if choice is None else {"add_special_tokens": choice}
            indices = [i for i, begins_with_bos in enumerate(begins) if begins_with_bos == with_bos]
            for begin in range(0, len(indices), ENCODED_AT_ONCE):
                chunk = indices[begin : begin + ENCODED_AT_ONCE]
                found = self.tokenizer([strings[i] for i in chunk], return_attention_mask=False, **options)
                for i, ids in zip(chunk, found["input_ids"], strict=True):
                    encoded[i] = np.array(ids, dtype=np.int32)
        return encoded

    def _reporter(self, kind: str, requests: list[Instance], disable_tqdm: bool) -> _Reporter:
        return _Reporter(self, kind, requests, self.progress and not disable_tqdm)


class _Reporter:
    """Tells of a result: the bar, the harness's own cache of responses, and the caller's ``on_result``."""

    def __init__(self, owner: HarnessModel, kind: str, requests: list[Instance], progress: bool):
        self.owner, self.kind, self.requests = owner, kind, requests
        self.bar = tqdm(total=len(requests), desc=kind, unit="request", disable=not progress, smoothing=0.05)

    def __call__(self, index: int, result: Any) -> None:
        self.owner.cache_hook.add_partial(self.kind, self.requests[index].args, result)
        if self.owner.on_result is not None:
            self.owner.on_result(index, self.requests[index], result)
        self.bar.update()

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
