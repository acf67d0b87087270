// Asks the server for its state once a second, while somebody looks, and shows it.

import { h, show } from "./dom.js";
import * as drift from "./drift.js";
import * as format from "./format.js";
import * as models from "./models.js";
import { Rates } from "./rates.js";

const PERIOD = 1000;
const SLOWEST = 5000;
/** An answer that takes longer is none. */
const PATIENCE = 5000;
/** Older numbers are marked. */
const FRESH = 4000;

const page = Object.fromEntries(
  ["readiness", "freshness", "stale", "totals", "filter", "models", "detail"].map((id) => [id, document.getElementById(id)]),
);
const rates = new Rates();

/** All that changes: the latest answers, when they came (this page's clock), and what is looked at. */
const now = { state: null, heard: 0, failures: 0, reason: "", detail: null, features: new Map(), address: location.hash };

// -- what is looked at ------------------------------------------------------------------------------------------------

function all(state) {
  return state.models.flatMap((model) => model.versions.map((version) => ({ model, version })));
}

/** The one in the address, or what most deserves to be looked at: an alert, then a default version that serves. It stays the chosen
 * one while it serves: nobody wants to read on about another one. After a swap the one that serves now is chosen, unless somebody
 * asked for this one. */
function chosen(state) {
  const found = all(state);
  const rank = ({ version }) => (version.state === "live") * 4 + (version.drift?.status === "alert") * 2 + version.is_default;
  const best = (some) => some.reduce((high, each) => (high === null || rank(each) > rank(high) ? each : high), null);
  const at = (address) => best(found.filter(({ model, version }) => models.address(model, version) === address));
  const before = at(now.address);
  if (before && (now.address === location.hash || before.version.state === "live")) return before;
  const siblings = before ? found.filter(({ model }) => model === before.model) : [];
  const next = best(siblings) ?? best(found);
  if (next) now.address = models.address(next.model, next.version);
  return next;
}

function watched() {
  const found = now.state && chosen(now.state);
  return found && found.version.drift && found.version.drift.status !== "learning" ? found : null;
}

// -- asking -----------------------------------------------------------------------------------------------------------

async function fetchJson(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(PATIENCE) });
  if (!answer.ok) throw new Error(`the server answered ${answer.status} to ${path}`);
  return answer.json();
}

async function look() {
  const state = await fetchJson("/dashboard/state");
  now.state = state;
  rates.add(state);
  const found = watched();
  if (found) await lookAtFeatures(found);
  now.heard = performance.now();
}

async function lookAtFeatures({ model, version }) {
  const name = `${model.name}:${version.version}`;
  if (now.detail?.name !== name) now.detail = null;
  const path = `/dashboard/drift?model=${encodeURIComponent(model.name)}&version=${version.version}`;
  // It may just have gone; the state of the next second has what is there instead.
  const answer = await fetchJson(path).catch((error) => {
    if (String(error).includes("404")) return null;
    throw error;
  });
  now.detail = answer?.features ? { name, answer } : null;
}

async function follow() {
  for (;;) {
    if (document.hidden) await new Promise((resume) => document.addEventListener("visibilitychange", resume, { once: true }));
    const began = performance.now();
    try {
      await look();
      [now.failures, now.reason] = [0, ""];
    } catch (error) {
      now.failures += 1;
      now.reason =
        error instanceof TypeError ? "it cannot be reached" : error.name === "TimeoutError" ? "it does not answer" : error.message;
    }
    render();
    const pause = Math.min(PERIOD * Math.max(now.failures, 1), SLOWEST);
    await new Promise((resume) => setTimeout(resume, Math.max(pause - (performance.now() - began), 100)));
  }
}

// -- showing ----------------------------------------------------------------------------------------------------------

function render() {
  renderFreshness();
  if (!now.state) return;
  const { state } = now;
  const found = chosen(state);
  show(page.totals, models.totals(state, rates));
  show(page.models, models.list(state, rates, found, page.filter.value.trim()));
  show(page.detail, found ? detail(state, found) : h("p", { class: "empty" }, "No version to show yet."));
  const alerts = all(state).reduce((sum, { version }) => sum + (version.drift?.alerts ?? 0), 0);
  document.title = found ? `${alerts ? `(${alerts}) ` : ""}${found.model.name} – Headrace` : "Headrace";
}

function readiness(server) {
  if (!server.is_live) return models.pill("warn", "stopping");
  return server.is_ready ? models.pill("good", "ready") : models.pill("warn", "not ready");
}

function renderFreshness() {
  const old = performance.now() - now.heard;
  const isStale = now.failures > 0 && (now.state === null || old > FRESH);
  document.body.classList.toggle("is-stale", isStale && now.state !== null);
  page.stale.hidden = !isStale;
  if (isStale) {
    const since = now.state ? `Numbers are ${format.age(old / 1000)} old, of ${format.when(now.state.server.at)}.` : "";
    show(page.stale, h("strong", null, "No answer from the server"), `: ${now.reason}. ${since} Trying again.`);
  }
  if (now.state) show(page.readiness, isStale ? models.pill("bad", "unreachable") : readiness(now.state.server));
  if (now.state)
    show(
      page.freshness,
      h("span", { class: `dot ${isStale ? "bad" : "good"}`, "aria-hidden": "true" }),
      isStale ? "stale" : "live",
      h("span", { class: "quiet" }, ` · ${now.state.server.version} · up ${format.age(now.state.server.at - now.state.server.started)}`),
    );
}

function detail(state, { model, version }) {
  const width = page.detail.clientWidth;
  // As the style sheet has it: as many cards side by side as fit, with their padding and gaps.
  const columns = width >= 1080 ? 3 : width >= 680 ? 2 : 1;
  const inside = Math.max(Math.floor((width - 16 * (columns - 1)) / columns) - 34, 240);
  const cards = version.counters
    ? [models.throughput, models.latency, models.batches].map((make) => make(state, rates, model, version, inside))
    : [];
  const answer = now.detail?.name === `${model.name}:${version.version}` ? now.detail.answer : null;
  const picked = now.features.get(`${model.name}:${version.version}`) ?? "";
  return [
    models.head(state, model, version),
    h("div", { class: `cards of-${columns}` }, cards),
    models.rollout(model, state.server.at),
    version.state === "live" || version.drift ? drift.section(version.drift, answer, picked, width - 34, state.server.at) : null,
    models.events(state, model),
  ];
}

document.addEventListener("click", (event) => {
  const row = event.target.closest?.("[data-feature], tr[data-key]");
  const key = row?.dataset.feature ?? row?.dataset.key;
  const found = now.state && chosen(now.state);
  if (!key || !found) return;
  now.features.set(`${found.model.name}:${found.version.version}`, key);
  render();
});
page.filter.addEventListener("input", render);
window.addEventListener("hashchange", () => {
  if (!location.hash.includes(":")) return; // the link that skips to the content
  now.address = location.hash;
  render();
  const found = watched();
  if (found) lookAtFeatures(found).then(render, () => undefined);
});
let drawnWidth = 0;
new ResizeObserver(() => {
  if (page.detail.clientWidth === drawnWidth) return;
  drawnWidth = page.detail.clientWidth;
  requestAnimationFrame(render);
}).observe(page.detail);
setInterval(renderFreshness, 1000);
follow();
