"""The work of an audit: one plan, units shared among processes, each computed once, everything else made from them.

Processes know of one another by the folder alone. Of W that were started together (``accelerate launch``, ``torchrun``) number r
begins with the units r, r + W, r + 2 W, ... and goes on with whatever is left; processes that were started by hand do the same with
W = 1. A claim (:mod:`.claims`) keeps two of them from the same unit.
"""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from .audit_folder import AUDIT, PLAN, POLL, REFERENCE, AuditFolder, read_json
from .audit_plan import AuditPlan, plan_audit
from .audit_request import AuditRequest
from .audit_source import DECISIVE
from .audit_summary import summarise
from .audit_unit import run_unit
from .hub_errors import redacted
from .probe import ProbePlan

Confirm = Callable[[AuditPlan], None]


class AuditRun:
    """An audit as one process sees it.

    Args:
        pipe: The pipeline.
        folder: Of the audit.
        model: What identifies the model, as docs/audit.md has it.
        request: What is asked for.
        provenance: Versions and commands, as docs/audit.md has them.
        reference: Numbers of the reference audit, or None.

    Attributes:
        plan: As it is stored; None before :meth:`prepare`.
    """

    def __init__(
        self,
        pipe: Any,
        folder: AuditFolder,
        model: dict[str, Any],
        request: AuditRequest,
        provenance: dict[str, Any],
        reference: dict[str, Any] | None = None,
    ) -> None:
        self.pipe, self.folder, self.model, self.request = pipe, folder, model, request
        self.provenance, self.reference, self.plan = provenance, reference, None
        self.processes = PartialState(cpu=torch.device(pipe.device).type == "cpu")

    def prepare(self, confirm: Confirm | None = None, planned: tuple[AuditPlan, AuditRequest] | None = None) -> None:
        """Plans, or takes the plan that the folder holds already.

        Args:
            confirm: Called with a new plan before anything is written; raises to refuse it.
            planned: A plan to take instead of making one, with its request.

        Raises:
            ValueError: the folder holds another audit; a request that cannot be met.
            AuditStopped: the folder cannot be written.
        """
        path = self.folder.path / PLAN
        if self.processes.is_main_process and not path.exists():
            plan, self.request = planned or plan_audit(self.pipe, self.request)
            if confirm is not None:
                confirm(plan)
            with self.folder.waiting("plan"):
                if not path.exists():
                    self._write_plan(plan)
        while not path.exists():
            time.sleep(POLL)
        self.plan = self.folder.read_plan()
        self.request = self._checked_request()

    def _write_plan(self, plan: AuditPlan) -> None:
        if self.reference is not None:
            self.folder.write_json(REFERENCE, self.reference)
        probe = None if plan.probe is None else asdict(plan.probe)
        document = {"schema": "diffusers_geometry.audit-plan/1", "model": self.model, "request": self.request.as_dict()}
        document |= {"plan": plan.as_dict(), "probe": probe, "provenance": self.provenance}
        self.folder.write_json(PLAN, document | {"run": {"started": now(), "host": platform.node()}})

    def _checked_request(self) -> AuditRequest:
        """The stored request, where it is the one that is asked for."""
        stored = self.plan["request"]
        asked = self.request.as_dict()
        if asked["options"]["psi_rank"] is None:
            asked["options"]["psi_rank"] = stored["options"]["psi_rank"]
        parts = [(stored, asked, "")] + [(stored[k], asked[k], f"{k} ") for k in ("call", "options")]
        parts += [
            (
                {k: v for k, v in self.plan["model"].items() if k != "name"},
                {k: v for k, v in self.model.items() if k != "name"},
                "model ",
            )
        ]
        made = self.plan["provenance"]["versions"]
        parts += [({k: made[k] for k in DECISIVE}, {k: self.provenance["versions"][k] for k in DECISIVE}, "version of ")]
        for before, after, what in reversed(parts):
            for name in sorted(set(before) | set(after)):
                if before.get(name) != after.get(name):
                    raise ValueError(
                        f"{self.folder.path} holds another audit: {what}{name} was {before.get(name)!r:.120} and is now "
                        f"{after.get(name)!r:.120}. Expected the same again to continue it, or an empty folder."
                    )
        return AuditRequest.from_dict(stored)

    def work(self, *, retry_failed: bool = False, progress: bool = True) -> dict[str, Any]:
        """Computes the units that are left, and makes everything else of them.

        Args:
            retry_failed: Try failed units again.
            progress: Show a bar with the time that is left.

        Returns:
            ``audit.json`` as a dict.

        Raises:
            AuditStopped: the folder cannot be written; what is finished is kept.
        """
        count, rank, world = len(self.request), self.processes.process_index, self.processes.num_processes
        if self.processes.is_main_process:
            self.folder.clean()
        if retry_failed:
            if self.processes.is_main_process:
                self.folder.forget_failures(count)
            self.processes.wait_for_everyone()  # none may count a failure that is about to be forgotten
        order = [*range(rank, count, world), *(i for i in range(count) if i % world != rank)]
        probe = None if self.plan["probe"] is None else ProbePlan(**self.plan["probe"])
        finished = self.folder.finished(count)
        hidden = not (progress and self.processes.is_main_process)
        with tqdm(total=count, initial=finished, desc="audit", unit="unit", disable=hidden) as bar:
            while finished < count:
                for i in order:
                    if self._unit(i, probe):
                        bar.update(self.folder.finished(count) - bar.n if not hidden else 0)
                finished = self.folder.finished(count)
                bar.update(finished - bar.n)
                if finished < count:
                    time.sleep(POLL)
        return self._summary()

    def _unit(self, i: int, probe: ProbePlan | None) -> bool:
        """Computes a unit unless it is finished or another process has it; says whether it did."""
        if self.folder.state(i) is not None or not self.folder.take(f"{i:05d}"):
            return False
        try:
            if self.folder.state(i) is not None:  # finished between the two looks
                return False
            start = time.perf_counter()
            try:
                found, error = run_unit(self.pipe, self.request, probe, i), None
            except Exception as raised:
                found, error = None, raised
            run = {"seconds": round(time.perf_counter() - start, 4), "finished": now(), "host": platform.node()}
            run |= {"process": self.folder.claims.token}
            if found is not None:
                self.folder.write_unit(i, found.arrays, found.document, run)
            else:
                self.folder.write_failure(i, _error_document(error), run)
            return True
        finally:
            self.folder.claims.release(f"{i:05d}")

    def _summary(self) -> dict[str, Any]:
        """Makes ``audit.json`` unless another process has made it of the same units."""
        path = self.folder.path / AUDIT
        with self.folder.waiting("summary"):
            self.folder.clean()
            newest = max(self.folder.path_of(i).stat().st_mtime_ns for i in range(len(self.request)))
            if path.exists() and path.stat().st_mtime_ns >= newest:
                return read_json(path)
            return summarise(self.folder)


def _error_document(error: Exception) -> dict[str, Any]:
    """Type, message without tokens, and the innermost place."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else None
    return {"type": type(error).__name__, "message": redacted(" ".join(str(error).split())), "where": where}


def now() -> str:
    """The time, as ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
