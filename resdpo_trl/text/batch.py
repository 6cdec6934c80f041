"""From tokenized pairs to the tensors of one forward pass, with the prompt shared or not.

With prefix sharing a pair is one row `[prompt | chosen | rejected]`: the prompt runs once, position ids restart
after it, and the rejected part does not see the chosen part ("Accelerating Direct Preference Optimization with
Prefix Sharing", https://arxiv.org/abs/2410.20305). Without, a pair is two rows `[prompt | chosen]` and
`[prompt | rejected]`. Either way the batch says which hidden states predict which response tokens, so that the LM
head runs there alone, and the rest of the code does not know the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PairCollator:
    """Pairs -> a batch. Rows are padded on the right to the longest.

    Returns, for B pairs in R rows (B shared, 2B not) of T tokens with N response tokens in all:
        input_ids: (R, T).
        position_ids: (R, T), with sharing; without, they are the model's own.
        attention_mask: (R, 1, T, T) bool, True where a query (row) sees a key (column), with sharing; (R, T) without.
        document, part: (R, T), instead of a mask with sharing and `block_mask`; see `attention.block_mask`.
        predicted_at: (2, N) row and column of the hidden states that predict a response token. Columns count from the
            end (−1 is the last), so that what PEFT's prompt tuning puts before a row moves none.
        predicted: (N,) the token predicted there.
        copies: (R, T) float32, how many of a pair's two sequences a token belongs to: 2 for a shared prompt, 0 for
            padding.
        response: (N,) whose token it is: pair i's chosen is 2i, its rejected 2i + 1.
        chosen_tokens, rejected_tokens: (B,) tokens of each response.
        ref_chosen_logps, ref_rejected_logps: (B,) float, where the pairs have them.
    """

    pad_token_id: int
    prefix_sharing: bool = True
    block_mask: bool = False

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._shared(pairs) if self.prefix_sharing else self._separate(pairs)
        batch["chosen_tokens"] = torch.tensor([len(pair["chosen_ids"]) for pair in pairs])
        batch["rejected_tokens"] = torch.tensor([len(pair["rejected_ids"]) for pair in pairs])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in pairs[0]:
                batch[name] = torch.tensor([pair[name] for pair in pairs])
        return batch

    def _shared(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [pair["prompt_ids"] + pair["chosen_ids"] + pair["rejected_ids"] for pair in pairs]
        width = max(map(len, rows))
        position_ids = torch.zeros(len(rows), width, dtype=torch.long)
        # (R, T): 0 prompt, 1 chosen, 2 rejected, 3 padding
        part = torch.full((len(rows), width), 3, dtype=torch.uint8)
        predicted_at, response = [], []
        for row, pair in enumerate(pairs):
            prompt, chosen, rejected = (len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
            second = prompt + chosen
            part[row, :prompt], part[row, prompt:second], part[row, second : second + rejected] = 0, 1, 2
            position_ids[row, :second] = torch.arange(second)
            position_ids[row, second : second + rejected] = torch.arange(prompt, prompt + rejected)
            # the prompt's last token predicts the first token of both
            at = torch.cat([torch.arange(prompt - 1, second - 1), torch.arange(second - 1, second + rejected - 1)])
            at[chosen] = prompt - 1
            predicted_at.append(torch.stack([torch.full_like(at, row), at - width]))
            response += [2 * row] * chosen + [2 * row + 1] * rejected
        if self.block_mask:
            mask = {"document": (part == 3).int(), "part": part.int()}
        else:
            queries, keys = part[:, :, None], part[:, None, :]
            # padding comes last, so a padded query still sees real keys: a row of the softmax is never empty
            sees = torch.ones(width, width, dtype=torch.bool).tril() & (keys != 3) & ~((queries == 2) & (keys == 1))
            mask = {"attention_mask": sees[:, None]}
        return {
            "input_ids": _pad(rows, width, self.pad_token_id),
            **mask,
            "position_ids": position_ids,
            "copies": torch.tensor([2.0, 1.0, 1.0, 0.0])[part.int()],
            "predicted_at": torch.cat(predicted_at, 1),
            "predicted": torch.tensor([token for pair in pairs for token in pair["chosen_ids"] + pair["rejected_ids"]]),
            "response": torch.tensor(response),
        }

    def _separate(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        sides = [(pair["prompt_ids"], pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
        rows = [prompt + response for prompt, response in sides]
        width = max(map(len, rows))
        real = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        response = torch.repeat_interleave(
            torch.arange(len(sides)), torch.tensor([len(response) for _, response in sides])
        )
        columns = [torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1) - width for prompt, response in sides]
        return {
            "input_ids": _pad(rows, width, self.pad_token_id),
            "attention_mask": real,
            "copies": real.float(),
            "predicted_at": torch.stack([response, torch.cat(columns)]),
            "predicted": torch.tensor([token for _, response in sides for token in response]),
            "response": response,
        }


@dataclass
class LabelCollator:
    """A collator of rows with labels, and what the response head reads: found here, no step waits for the device.

    Adds, for N tokens with a label (a row's first is not predicted): predicted_at and predicted, as in `PairCollator`.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collate(rows)
        labels = batch["labels"]
        row, column = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
        at = torch.stack([row, column - labels.shape[1]])
        return {**batch, "predicted_at": at, "predicted": labels[row, column + 1]}


def _pad(rows: list[list[int]], width: int, pad_token_id: int) -> Tensor:
    return torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows])
