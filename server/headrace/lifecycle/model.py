"""One model: the versions there are, those that are wanted, and the route by which requests find them.

How it works. Whatever happens (an offer, a change of a version's state, an operator's word) ends in `changed`: the route is
brought up to date at once, and once per turn of the event loop the pure policy is asked for steps until it has none. Nothing
waits for anything here: fetching, loading and draining are tasks that end in another change of state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from headrace.config import RolloutConfig
from headrace.errors import FailedPrecondition, LoadError, NotFound
from headrace.lifecycle.events import SERVER, Actor
from headrace.lifecycle.labels import Labels
from headrace.lifecycle.parts import Parts
from headrace.lifecycle.policy import (
    Action,
    Key,
    Preference,
    Step,
    SwapPolicy,
    VersionStatus,
    choose_serving,
    newest_selected,
    next_step,
    retry_delay,
    select_versions,
    swap_policy,
    wanted_versions,
)
from headrace.lifecycle.routes import Route
from headrace.lifecycle.state import ARRIVING, VersionState
from headrace.lifecycle.trial import Trial
from headrace.lifecycle.version import ModelVersion, event_of
from headrace.lifecycle.wanted import Offer
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

RETRY_AFTER_LOSS = 1.0
REMEMBERED = 4
"""Unloaded versions that the index still shows."""


class Model:
    """Owns one model's versions, labels and trial. Event loop only, but for `route`, which any thread may read."""

    def __init__(self, name: str, parts: Parts) -> None:
        self.name = name
        self.route = Route()
        self.offer: Offer | None = None
        self.error = ""
        self.error_source = ""
        self.versions: list[ModelVersion] = []
        self.unloaded: dict[int, str] = {}
        self.labels = Labels()
        self.trial: Trial | None = None
        self.blocked: dict[Key, str] = {}
        self._parts = parts
        self._loads: dict[ModelVersion, asyncio.Task[None]] = {}
        self._unloads: set[asyncio.Task[None]] = set()
        self._leaving: set[ModelVersion] = set()
        self._failures: dict[Key, int] = {}
        self._held: set[Key] | None = None
        self._preference: Preference | None = None
        self._decided: ModelVersion | None = None
        self._is_due = False
        self._is_closed = False
        self._settled = asyncio.Event()
        self._settled.set()

    def __repr__(self) -> str:
        return f"Model({self.name}, {self.versions!r}, default={self.route.default and self.route.default.version})"

    # -- what is wanted ------------------------------------------------------------------------------------------------

    def set_offer(self, offer: Offer) -> None:
        """Work towards what is offered now; with no versions in it all are unloaded. `error` of an earlier offer is forgotten."""
        self.offer = offer
        self.error = ""
        if self.trial is not None and not offer.versions:
            self._end_trial("superseded", "its source has the model no longer")
        self.labels.configure({**offer.config.labels, **offer.labels})
        offered = {version.key for version in offer.versions.values()}
        self._failures = {key: count for key, count in self._failures.items() if key in offered}
        if offer.versions and not self._selected():
            there = ", ".join(map(str, sorted(offer.versions)))
            self.error = f"version_policy '{offer.config.version_policy}' selects none of its versions: {there}"
        self.changed()

    def withdraw(self) -> None:
        """Nothing is offered any more; the model stays known."""
        self.offer = None
        self.error = ""
        if self.trial is not None:
            self._end_trial("superseded", "the model was unloaded by request")
        self.changed()

    def remember(self, blocked: Mapping[Key, str], labels: Mapping[str, int]) -> None:
        """What an earlier run of the server left. Before the first offer."""
        self.blocked.update(blocked)
        self.labels.remember(labels)

    def _selected(self) -> set[Key]:
        if self.offer is None:
            return set()
        there = {number: want.key for number, want in self.offer.versions.items() if want.key not in self.blocked}
        return {there[number] for number in select_versions(there, self.offer.config.version_policy)}

    def wanted(self) -> set[Key]:
        if self.offer is None:
            return set()
        wanted = wanted_versions(
            {number: want.token for number, want in self.offer.versions.items()},
            self.offer.config.version_policy,
            blocked=self.blocked.keys(),
            # Of a lost device no version is to blame: an older one in its place would be no better.
            failed={version.key for version in self.versions if version.state is VersionState.FAILED and not version.is_lost},
            labelled=self.labels.versions,
            serving=self._serving,
        )
        if self.trial is not None:
            wanted |= {self.trial.candidate.key, self.trial.baseline.key}
        if self._held is not None:
            wanted |= self._held
        if self._preference is not None and max(self.offer.versions, default=0) <= self._preference.known:
            wanted.add(self._preference.key)
        # What a trial or a serving version holds on to may be gone from the source: then there is nothing to start again.
        present = {version.key for version in self.versions if version.state is not VersionState.UNLOADED}
        return wanted & (present | {want.key for want in self.offer.versions.values()})

    def traffic(self, version: ModelVersion) -> float:
        """Percent of the requests that name no version which this one answers."""
        trial = self.trial if self.trial is not None and self.trial.is_running else None
        share = trial.config.percent if trial is not None and trial.config.mode == "canary" else 0.0
        if trial is not None and version is trial.candidate and share:
            return share
        return 100.0 - share if version is self.route.default else 0.0

    @property
    def is_gone(self) -> bool:
        """Nothing is offered and nothing is left."""
        return self.offer is not None and not self.offer.versions and not self.versions and not self.error

    @property
    def _serving(self) -> Key | None:
        return self.route.default.key if self.route.default is not None else None

    @property
    def is_serving(self) -> bool:
        return self.route.default is not None

    # -- steps ---------------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Bring the route up to date, and see to the next steps once everything that happens now has happened."""
        if self._is_closed:
            return
        self._update_route()
        if not self._is_due:
            self._is_due = True
            self._settled.clear()
            asyncio.get_running_loop().call_soon(self._reconcile)
        self._parts.notify()

    def _reconcile(self) -> None:
        self._is_due = False
        if self._is_closed:
            return
        try:
            self._take_steps()
        except Exception:
            # Nobody above would see it, and whoever waits for this model would wait for ever.
            log.exception("model's next steps failed", model=self.name)
            self._settled.set()
        self._parts.notify()

    def _take_steps(self) -> None:
        while (step := next_step(self.wanted(), self._statuses(), self._swap_policy(), self._serving)) is not None:
            self._take(step)
        if not any(version.state in ARRIVING for version in self.versions):
            self._settled.set()

    def _statuses(self) -> list[VersionStatus]:
        return [
            VersionStatus(v.key, VersionState.DRAINING if v in self._leaving else v.state, v.is_prepared, self._is_offered(v))
            for v in self.versions
        ]

    def _is_offered(self, version: ModelVersion) -> bool:
        want = self.offer.versions.get(version.version) if self.offer is not None else None
        return want is not None and want.key == version.key and version.key not in self.blocked

    def _swap_policy(self) -> SwapPolicy:
        """As configured; by what the newest version that waits to be loaded needs, where memory is to decide."""
        configured = self.offer.config.swap_policy if self.offer else "availability"
        waiting = [v for v in self.versions if v.is_prepared and v.state is VersionState.VERIFYING and v.inspection is not None]
        if not waiting:
            return swap_policy(configured, 0, 1)
        newest = max(waiting, key=lambda v: v.key)
        assert newest.inspection is not None
        needed = max([newest.inspection.needed, *(v.memory_bytes for v in self.versions if v.is_live)])
        return swap_policy(configured, needed, newest.inspection.available)

    def _take(self, step: Step) -> None:
        if step.action is Action.START:
            self._start(step.key)
            return
        version = next(v for v in self.versions if v.key == step.key and v not in self._leaving and v.state is not VersionState.UNLOADED)
        if step.action is Action.LOAD:
            version.displaces = self._swap_policy() is SwapPolicy.RESOURCE
            version.allow_load()
            version.is_prepared = False
        elif version.state is VersionState.FAILED:
            self._forget(version)
        elif version.is_live:
            self._leaving.add(version)
            task = self._parts.tasks.start(self._unload(version, "unloaded"), f"unload {version.name}")
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)
            self._update_route()
        elif version.state is VersionState.DISCOVERED:
            # Its task has not begun, and a task that is cancelled before that never comes to its own end.
            self._loads.pop(version).cancel()
            version.abandon()
            self._remove(version)
        else:
            self._leaving.add(version)
            self._loads[version].cancel()

    def _start(self, key: Key) -> None:
        assert self.offer is not None
        version = ModelVersion(
            self.offer.versions[key.number],
            timer=self._parts.timer,
            schedule=self._parts.schedule,
            records=self._parts.records,
            devices=self._parts.devices,
            drift=self._parts.drift,
            attachments=self._parts.attachments,
            on_change=self._version_changed,
            on_lost=self._parts.lost,
            pause=self._parts.pause,
        )
        self.versions.append(version)
        self.unloaded.pop(key.number, None)
        self._loads[version] = self._parts.tasks.start(self._load(version), f"load {version.name}")

    async def _load(self, version: ModelVersion) -> None:
        try:
            await version.load(self._parts.backends, self._parts.slots, lambda: self.route.default)
        finally:
            self._loads.pop(version, None)
            if version.state is VersionState.UNLOADED:
                self._remove(version)

    async def _unload(self, version: ModelVersion, reason: str) -> None:
        await version.unload(self._parts.drain_grace, reason)
        self._remove(version)

    def _forget(self, version: ModelVersion) -> None:
        version.move(VersionState.UNLOADED, version.reason)
        self._remove(version)

    def _remove(self, version: ModelVersion) -> None:
        self._leaving.discard(version)
        if version in self.versions:
            self.versions.remove(version)
        self.unloaded[version.version] = version.reason
        while len(self.unloaded) > REMEMBERED:
            del self.unloaded[next(iter(self.unloaded))]
        self._parts.unloaded(version)
        self.changed()

    def _version_changed(self, version: ModelVersion) -> None:
        event = event_of(version)
        if event is not None:
            self._parts.events.record(event[0], self.name, version.version, reason=version.reason, fields=event[1])
        if version.state is VersionState.FAILED:
            if version.load_seconds:
                self._parts.tasks.start(version.put_away(), f"put away {version.name}")
            self._retry_later(version)
        self.changed()

    def _retry_later(self, version: ModelVersion) -> None:
        """Not where the old version would have to go again to make room for what may fail again. What was live and lost its devices is
        tried again soon: there may be others."""
        has_served = bool(version.load_seconds)
        count = self._failures[version.key] = 1 if has_served else self._failures.get(version.key, 0) + 1
        if has_served or not version.displaces:
            delay = RETRY_AFTER_LOSS if has_served else retry_delay(count)
            asyncio.get_running_loop().call_later(delay, self._retry, version)

    def _retry(self, version: ModelVersion) -> None:
        if version in self.versions and version.state is VersionState.FAILED and not self._is_closed:
            log.info("version tried again", model=self.name, version=version.version, failures=self._failures.get(version.key, 0))
            self._forget(version)

    # -- the route -----------------------------------------------------------------------------------------------------

    def _update_route(self) -> None:
        by_key = {
            version.key: version
            for version in self.versions
            if version.is_live and version not in self._leaving and (self._held is None or version.key in self._held)
        }
        # In the order of their start: of one number's contents the newest counts.
        live = {version.version: version for version in by_key.values()}
        for label, before, after in self.labels.settle(live):
            self._parts.events.record("label", self.name, after, fields={"label": label, "from": str(before)})
        default = self._choose_default(by_key)
        before_default = self.route.default
        divert = self.trial.divert if self.trial is not None and self.trial.is_running else None
        self.route = Route(default, live, dict(self.labels.current), divert)
        if default is not before_default and default is not None:
            old = before_default.version if before_default is not None else 0
            self._parts.events.record("flip", self.name, default.version, fields={"from": str(old)})
            if before_default is not None:
                before_default.hand_over(default)
            log.info("version serves", model=self.name, version=default.version, instead_of=old or None)

    def _choose_default(self, live: Mapping[Key, ModelVersion]) -> ModelVersion | None:
        """1. What was just decided. 2. What a trial says. 3. What the policy says, perhaps after a trial."""
        decided, self._decided = self._decided, None
        if decided is not None and decided in live.values():
            return decided
        current = self.route.default
        if self.trial is not None and not {self.trial.candidate.key, self.trial.baseline.key} <= live.keys():
            self._end_trial("superseded", "one of its versions went away")
        if self.trial is not None and self.trial.is_running:
            newest = newest_selected(live.keys(), self._selected(), self._preference)
            if newest in (None, self.trial.candidate.key, self.trial.baseline.key):
                return self.trial.default
            current = self.trial.baseline  # the other one, though it may serve, has not passed
            self._end_trial("superseded", f"version {newest.number} came")
        choice = choose_serving(
            live.keys(),
            self._selected(),
            current.key if current is not None else None,
            preference=self._preference,
            offered={version.key for version in live.values() if self._is_offered(version)},
            blocked=self.blocked.keys(),
            has_trials=self._rollout.mode != "direct",
        )
        if choice.key is None:
            return None
        if choice.is_tried and current is not None:
            return self._begin_trial(live[choice.key], current, self._rollout).default
        return live[choice.key]

    @property
    def _rollout(self) -> RolloutConfig:
        return self.offer.config.rollout if self.offer is not None else RolloutConfig()

    # -- trials --------------------------------------------------------------------------------------------------------

    def _begin_trial(
        self,
        candidate: ModelVersion,
        baseline: ModelVersion,
        config: RolloutConfig,
        actor: Actor = Actor(),  # noqa: B008  # frozen
    ) -> Trial:
        self.trial = Trial(candidate, baseline, config, self._conclude)
        fields = {"mode": config.mode, "percent": f"{config.percent:g}", "from": str(baseline.version)}
        self._parts.events.record("rollout", self.name, candidate.version, who=actor.name, reason=actor.reason, fields=fields)
        log.info("rollout began", model=self.name, version=candidate.version, **fields)
        self._parts.tasks.start(self.trial.watch(), f"watch {candidate.name}")
        return self.trial

    def _conclude(self, trial: Trial, phase: str, reason: str) -> None:
        """The trial's own verdict."""
        if trial is not self.trial:
            return
        if phase == "promoted":
            self.promote_candidate(Actor(reason=reason))
        elif phase == "rolled_back":
            self.give_up(trial.candidate, Actor(reason=reason))
        else:
            log.info("rollout passed", model=self.name, version=trial.candidate.version, waits_for="headrace models promote")
            self._parts.events.record("passed", self.name, trial.candidate.version, reason=reason)
            self.changed()

    def _end_trial(self, phase: str, reason: str) -> None:
        assert self.trial is not None
        trial, self.trial = self.trial, None
        trial.end(phase, reason)
        if phase == "superseded":
            self._parts.events.record("superseded", self.name, trial.candidate.version, reason=reason)

    def promote_candidate(self, actor: Actor) -> None:
        """The candidate becomes the version that serves; the old one is unloaded."""
        assert self.trial is not None
        candidate = self.trial.candidate
        self._parts.events.record("promoted", self.name, candidate.version, who=actor.name, reason=actor.reason)
        log.info("version promoted", model=self.name, version=candidate.version, reason=actor.reason, who=actor.name)
        self._preference = Preference(candidate.key, max(self.route.live))
        self._decided = candidate
        self._end_trial("promoted", actor.reason)
        self.changed()

    def give_up(self, version: ModelVersion, actor: Actor) -> None:
        """Roll back: what served before serves, and this content is not taken up again."""
        baseline = self.trial.baseline if self.trial is not None and self.trial.candidate is version else None
        self.blocked[version.key] = actor.reason
        self._parts.events.record(
            "rolled_back", self.name, version.version, who=actor.name, reason=actor.reason, fields={"token": version.key.token}
        )
        log.warning("version rolled back", model=self.name, version=version.version, reason=actor.reason, who=actor.name)
        if baseline is not None:
            self._decided = baseline
            self._end_trial("rolled_back", actor.reason)
        self.changed()

    def take_up(self, number: int, actor: Actor) -> bool:
        """Forget that a version was rolled back. False where it was not."""
        keys = [key for key in self.blocked if key.number == number]
        for key in keys:
            del self.blocked[key]
        if keys:
            self._parts.events.record("taken_up", self.name, number, who=actor.name, reason=actor.reason)
            self.changed()
        return bool(keys)

    def set_trial(self, number: int, mode: str, percent: float, actor: Actor) -> None:
        """Put a live version on trial, or change the trial it is on; by hand, so it is promoted by hand."""
        version, default = self.route.live.get(number), self.route.default
        if version is None or default is None:
            raise NotFound(f"model '{self.name}' has no live version {number}; live: {', '.join(map(str, sorted(self.route.live)))}")
        trial = self.trial
        if trial is not None and trial.candidate is version:
            trial.change(mode, percent)
            fields = {"mode": mode, "percent": f"{percent:g}"}
            self._parts.events.record("traffic", self.name, number, who=actor.name, reason=actor.reason, fields=fields)
        elif version is default:
            raise FailedPrecondition(f"version {number} of '{self.name}' serves already; expected another live version")
        else:
            if trial is not None:
                self._end_trial("superseded", f"version {number} was put on trial by {actor.name}")
            self._begin_trial(version, default, replace(self._rollout, mode=mode, percent=percent, promote="manual"), actor)
        self.changed()

    def set_label(self, label: str, version: int, actor: Actor) -> None:
        before = self.labels.current.get(label, 0)
        self.labels.move(label, version, self.route.live)
        moved = dict(self.labels.current)
        for name, old, new in self.labels.settle(self.route.live):
            mine = name == label
            who, reason = (actor.name, actor.reason) if mine else (SERVER, "")
            fields = {"label": name, "from": str(old)}
            self._parts.events.record("label", self.name, new, who=who, reason=reason, fields=fields)
        if before == version and moved == self.labels.current:
            return
        self.changed()

    # -- all or nothing ------------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Wait until nothing is on its way to being live."""
        await self._settled.wait()

    async def load_whole(self, offer: Offer) -> None:
        """As `set_offer`, but nothing of it serves before all of it is live; otherwise all stays as it was.

        Raises LoadError with Triton's text for the first version that failed.
        """
        before = self.offer
        self._held = {version.key for version in self.route.live.values()}
        try:
            for version in [v for v in self.versions if v.state is VersionState.FAILED]:
                self._forget(version)
            self.set_offer(offer)
            await self.settle()
            failed = [v for v in self.versions if v.state is VersionState.FAILED and v.key in self._selected()]
            if failed:
                first = failed[0]
                text = f"load failed for model '{self.name}': version {first.version} is at UNAVAILABLE state: {first.reason};"
                if before is None:
                    self.withdraw()
                else:
                    self.set_offer(before)
                raise LoadError(text)
        finally:
            self._held = None
            self.changed()

    # -- the end -------------------------------------------------------------------------------------------------------

    async def close(self, grace: float, reason: str) -> None:
        """Take no more requests, drain, give everything back. Loads are cancelled."""
        self._is_closed = True
        self.route = Route()
        if self.trial is not None:
            self._end_trial("ended", reason)
        for task in self._loads.values():
            task.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        await asyncio.gather(*(version.unload(grace, reason) for version in self.versions))
        if self._unloads:
            await asyncio.wait(self._unloads, timeout=grace)
