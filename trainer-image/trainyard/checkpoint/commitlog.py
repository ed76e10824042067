"""Reading and appending the commit log of one run. The rules are in `trainyard_api.checkpoints`."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from trainyard.checkpoint.errors import NotFound, StoreError
from trainyard.checkpoint.stores import Store
from trainyard_api.checkpoints import Record, check_fence, commit_key, next_seq, prunable, step_prefix

_KEY = re.compile(r"commits/(\d{8})\.json")
_DATA = re.compile(r"data/step-(\d{12})/a(\d{6})/")
_TRIES = 100
"""Records that others may put before ours before we call it a fault."""


class CommitLog:
    """Not for several threads at once. Records never change, so that each is fetched once only."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self._run = run
        self._records: dict[int, Record] = {}
        self.unreadable: dict[int, str] = {}
        """By seq: why the record is not used. Such a record still takes its number."""

    @property
    def records(self) -> list[Record]:
        """As of the last `refresh`, by seq."""
        return [self._records[seq] for seq in sorted(self._records)]

    def uri(self, seq: int) -> str:
        return f"{self._store.uri}/{commit_key(seq)}"

    def refresh(self) -> list[Record]:
        """Read what is new. Raises StoreError."""
        present = {int(m[1]) for key in self._store.list("commits/") if (m := _KEY.fullmatch(key))}
        for known in (self._records, self.unreadable):
            for gone in set(known) - present:
                del known[gone]
        for seq in sorted(present - set(self._records) - set(self.unreadable)):
            try:
                self._records[seq] = self._parse(seq, self._store.get(commit_key(seq)))
            except NotFound:
                continue  # pruned since the listing
            except ValueError as error:
                self.unreadable[seq] = str(error)
        return self.records

    def try_append(self, record: Record) -> Record | None:
        """`record` with the number after all that are known; None if that number is taken: refresh, and decide anew.

        Raises Fenced if a newer attempt is known.
        """
        check_fence(self._records.values(), record.attempt)
        numbered = replace(record, seq=next_seq([*self._records, *self.unreadable]))
        if self._store.create(commit_key(numbered.seq), json.dumps(numbered.to_json(), indent=1).encode()):
            self._records[numbered.seq] = numbered
            return numbered
        # The answer to an earlier try of ours may have been lost: then the record there is this very one.
        self.refresh()
        return numbered if self._records.get(numbered.seq) == numbered else None

    def append(self, record: Record) -> Record:
        """Append after whatever is there. Raises Fenced, StoreError; after StoreUnavailable it may be called again."""
        for _ in range(_TRIES):
            ours = [r for r in self.refresh() if replace(r, seq=record.seq) == record]
            if ours:  # an earlier call got through, and only its answer was lost
                return ours[0]
            appended = self.try_append(record)
            if appended is not None:
                return appended
        raise StoreError(f"{self._store.uri}: lost the race for the next record {_TRIES} times")

    def prune(self, *, keep: int, attempt: int) -> list[str]:
        """Delete old commits and what belongs to none; returns the keys. Raises Fenced, StoreError.

        The record goes first: a commit that is listed must be loadable. Data without a commit goes once its step is
        below all commits that are kept, so that no save that is still under way is touched.
        """
        self.refresh()
        check_fence(self._records.values(), attempt)
        old = prunable(self.records, keep=keep)
        gone = [commit_key(r.seq) for r in old]
        self._store.delete(gone)
        for record in old:
            self._records.pop(record.seq, None)
        kept = [r for r in self._records.values() if r.kind == "commit"]
        if not kept:
            return gone
        lowest = min(r.step for r in kept)
        in_use = {step_prefix(r.step, r.attempt) for r in kept}
        pruned = {step_prefix(r.step, r.attempt) for r in old}
        data = [
            key
            for key in self._store.list("data/")
            if (m := _DATA.match(key))
            and m[0] not in in_use
            and (m[0] in pruned or (int(m[1]) < lowest and int(m[2]) <= attempt))
        ]
        self._store.delete(data)
        return gone + data

    def _parse(self, seq: int, data: bytes) -> Record:
        try:
            return Record.from_json(json.loads(data), run=self._run, seq=seq)
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith("commits/") else f"{commit_key(seq)}: {text}") from error
