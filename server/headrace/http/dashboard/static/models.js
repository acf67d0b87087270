// The list of models and versions, and what is said of the chosen one but its drift.

import * as charts from "./charts.js";
import { h } from "./dom.js";
import * as format from "./format.js";
import { SHOWN, WINDOW, quantile } from "./rates.js";

const ARRIVING = ["discovered", "fetching", "verifying", "loading", "warming"];
const TONES = { live: "good", failed: "bad", draining: "warn", unloading: "warn", "rolled back": "bad" };

export function address(model, version) {
  return `#${encodeURIComponent(model.name)}:${version.version}`;
}

export function tone(version) {
  return TONES[version.state] ?? (ARRIVING.includes(version.state) ? "busy" : "quiet");
}

export function pill(kind, ...words) {
  return h("span", { class: `pill ${kind}` }, ...words);
}

/** What of the drift belongs into a list. */
export function driftBadge(drift) {
  if (!drift) return null;
  if (drift.status === "alert") return pill("bad", format.plural(drift.alerts, "drift alert"));
  if (drift.status === "learning")
    return pill("busy", `learning ${Math.floor((100 * drift.learnt_rows) / Math.max(drift.learn_rows, 1))} %`);
  return null;
}

// -- the list ---------------------------------------------------------------------------------------------------------

export function list(state, rates, chosen, filter) {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const found = state.models.map((model) => listed(model, rates, chosen, words)).filter((each) => each !== null);
  if (found.length) return found;
  return h("p", { class: "empty" }, state.models.length ? `No model or version matches “${filter}”.` : "No model is known yet.");
}

function listed(model, rates, chosen, words) {
  const matches = (version) => {
    const text = [model.name, version.version, version.state, ...version.labels, version.drift?.status === "alert" ? "alert drift" : ""]
      .join(" ")
      .toLowerCase();
    return words.every((word) => text.includes(word));
  };
  const versions = model.versions.filter(matches).sort((one, other) => other.version - one.version);
  if (!versions.length && (model.versions.length || !words.every((word) => model.name.toLowerCase().includes(word)))) return null;
  return h(
    "section",
    { class: "model", "data-key": model.name },
    h("h3", { title: model.name }, model.name),
    model.error ? h("p", { class: "note bad" }, model.error) : null,
    h(
      "ul",
      null,
      versions.map((version) => item(model, version, rates, chosen)),
    ),
  );
}

function item(model, version, rates, chosen) {
  const { recent } = rates.of(model, version);
  const isChosen = chosen !== null && chosen.model === model && chosen.version === version;
  return h(
    "li",
    { "data-key": version.id + version.state },
    h(
      "a",
      { class: "version", href: address(model, version), "aria-current": isChosen ? "true" : null },
      h("span", { class: `dot ${tone(version)}`, "aria-hidden": "true" }),
      h("span", { class: "number" }, `v${version.version}`),
      h("span", { class: "state" }, version.state, version.labels.length ? ` · ${version.labels.join(", ")}` : ""),
      h("span", { class: "figure" }, recent ? `${format.rate(recent.requests)}/s` : ""),
      h(
        "span",
        { class: "badges" },
        (version.is_default && version.traffic < 100) || (!version.is_default && version.traffic > 0)
          ? pill("quiet", `${Number(version.traffic.toFixed(1))} % of traffic`)
          : null,
        driftBadge(version.drift),
      ),
    ),
  );
}

// -- all together -----------------------------------------------------------------------------------------------------

export function totals(state, rates) {
  const together = rates.together();
  const versions = state.models.flatMap((model) => model.versions);
  const live = versions.filter((version) => version.state === "live").length;
  const failed = versions.filter((version) => version.state === "failed").length;
  const alerts = versions.reduce((sum, version) => sum + (version.drift?.alerts ?? 0), 0);
  const watched = versions.filter((version) => version.drift).length;
  const p99 = together ? quantile(state.seconds, together.request_buckets, 0.99) : null;
  return [
    tile("Requests", together ? format.rate(together.requests) : format.NONE, "per second"),
    tile("Rows", together ? format.rate(together.rows) : format.NONE, "per second"),
    tile("Failures", together ? format.rate(together.failures) : format.NONE, "per second", together?.failures > 0 ? "bad" : ""),
    tile("Latency p99", format.duration(p99), `last ${WINDOW} s`),
    tile(
      "Versions live",
      format.count(live),
      failed ? `${failed} failed` : `of ${format.plural(state.models.length, "model")}`,
      failed ? "some-bad" : "",
    ),
    tile(
      "Drift alerts",
      format.count(alerts),
      watched ? `${format.plural(watched, "version")} watched` : "nothing watched",
      alerts ? "bad" : "",
    ),
  ];
}

function tile(name, figure, unit, kind = "") {
  return h(
    "div",
    { class: `tile ${kind}` },
    h("span", { class: "name" }, name),
    h("strong", null, figure),
    h("span", { class: "unit" }, unit),
  );
}

// -- the chosen version -----------------------------------------------------------------------------------------------

export function head(state, model, version) {
  const at = state.server.at;
  const facts = [
    version.since ? `${version.state} for ${format.age(at - version.since)}` : "",
    version.traffic ? `${Number(version.traffic.toFixed(1))} % of the traffic` : "",
    version.load_seconds ? `loaded in ${format.duration(version.load_seconds)}` : "",
    version.memory_bytes ? `${format.bytes(version.memory_bytes)} of memory` : "",
    version.digest ? `digest ${version.digest}` : "",
    model.policy ? `policy ${model.policy}` : "",
    model.source ? `from ${model.source}` : "",
    ...Object.entries(version.metadata).map(([name, value]) => `${name} ${value}`),
  ];
  return h(
    "header",
    { class: "head" },
    h("h2", null, model.name, h("span", { class: "of" }, ` version ${version.version}`)),
    h(
      "p",
      { class: "pills" },
      pill(tone(version), version.state),
      version.is_default ? pill("quiet", "default") : null,
      version.labels.map((label) => pill("quiet", label)),
      driftBadge(version.drift),
    ),
    h(
      "p",
      { class: "facts" },
      facts.filter(Boolean).map((fact) => h("span", null, fact)),
    ),
    version.reason ? h("p", { class: `note ${version.state === "failed" ? "bad" : ""}` }, version.reason) : null,
    model.error ? h("p", { class: "note bad" }, model.error) : null,
    elsewhere(model, version),
  );
}

/** Where to look instead, for who looks at a version that serves no more, or not yet. */
function elsewhere(model, version) {
  const serving = model.versions.find((each) => each.is_default);
  if (!serving || version.state === "live") return null;
  return h("p", { class: "note" }, h("a", { href: address(model, serving) }, `Version ${serving.version}`), " serves this model now.");
}

export function rollout(model, at) {
  const trial = model.rollout;
  if (!trial) return null;
  const isRunning = trial.phase === "running";
  return card(
    "Rollout",
    `${trial.mode}, ${trial.phase.replace("_", " ")}`,
    "wide",
    h(
      "p",
      null,
      `Version ${trial.candidate} beside version ${trial.baseline}, ${Number(trial.percent.toFixed(1))} % of the requests, `,
      `since ${format.age(at - trial.began)}`,
      isRunning ? `; decided in ${format.age(trial.seconds_left)} at the earliest.` : ".",
    ),
    isRunning
      ? h(
          "label",
          { class: "progress" },
          h("progress", { value: Math.min(trial.requests, trial.min_requests), max: Math.max(trial.min_requests, 1) }),
          `${format.count(trial.requests)} of at least ${format.count(trial.min_requests)} requests`,
        )
      : null,
    trial.reason ? h("p", { class: "note" }, trial.reason) : null,
    trial.evidence.length
      ? h(
          "div",
          { class: "scroll" },
          h(
            "table",
            null,
            h(
              "thead",
              null,
              h(
                "tr",
                null,
                h("th", { scope: "col" }, "Evidence"),
                h("th", { scope: "col" }, `version ${trial.candidate}`),
                h("th", { scope: "col" }, `version ${trial.baseline}`),
              ),
            ),
            h(
              "tbody",
              null,
              trial.evidence.map(([name, mine, other]) =>
                h("tr", null, h("th", { scope: "row" }, name), h("td", null, mine), h("td", null, other)),
              ),
            ),
          ),
        )
      : null,
  );
}

export function card(title, aside, kind, ...parts) {
  return h(
    "section",
    { class: `card ${kind}`, "aria-label": title },
    h("header", null, h("h3", null, title), h("p", null, aside)),
    ...parts,
  );
}

export function throughput(state, rates, model, version, width) {
  const { recent, history } = rates.of(model, version);
  const failed = Object.entries(version.counters.failures)
    .filter(([, count]) => count)
    .map(([reason, count]) => `${format.count(count)} ${reason}`);
  return card(
    "Throughput",
    `last ${WINDOW} s`,
    "",
    h(
      "p",
      { class: "figures" },
      figure(recent ? format.rate(recent.requests) : format.NONE, "req/s", "key requests"),
      figure(recent ? format.rate(recent.rows) : format.NONE, "rows/s"),
      figure(recent ? format.rate(recent.failures) : format.NONE, "failed/s", recent?.failures > 0 ? "key failures bad" : "key failures"),
    ),
    charts.overTime(history, {
      width,
      height: 150,
      now: state.server.clock,
      seconds: SHOWN,
      names: ["requests", "failures"],
      label: "Throughput",
      unit: "requests/s",
    }),
    h(
      "p",
      { class: "foot" },
      `${format.count(version.counters.success)} answered since it was loaded, `,
      failed.length ? `failed: ${failed.join(", ")}; ` : "none failed; ",
      `${format.plural(version.waiting_rows, "row")} waiting.`,
    ),
  );
}

function figure(number, unit, kind = "") {
  return h("span", { class: `number ${kind}` }, h("strong", null, number), ` ${unit}`);
}

const STAGES = [
  ["request", "Request"],
  ["queue", "Queue"],
  ["compute_input", "Input"],
  ["compute", "Compute"],
  ["compute_output", "Output"],
];

export function latency(state, rates, model, version, width) {
  const { recent } = rates.of(model, version);
  const rows = STAGES.map(([stage, name]) => {
    const counts = recent?.buckets[state.stages.indexOf(stage)];
    return { name, p50: counts ? quantile(state.seconds, counts, 0.5) : null, p99: counts ? quantile(state.seconds, counts, 0.99) : null };
  });
  return card(
    "Latency by stage",
    `last ${WINDOW} s`,
    "",
    charts.latencies(rows, { width }),
    h(
      "p",
      { class: "foot" },
      rows[0].p50 === null
        ? "No request was answered in that time."
        : "Request: from a message's arrival to its encoded answer. Circle: median; bar: p99.",
    ),
  );
}

export function batches(state, rates, model, version, width) {
  const { recent } = rates.of(model, version);
  const counters = version.counters;
  const counts = recent && recent.batches > 0 ? recent.batch_buckets : counters.batch_buckets;
  const isRecent = counts !== counters.batch_buckets;
  const all = counts.reduce((sum, count) => sum + count, 0);
  const last = Math.max(counts.findLastIndex((count) => count > 0) + 1, 6);
  const labels = [...state.rows.map((edge, index) => (index < 2 ? String(edge) : `≤${edge}`)), `>${state.rows.at(-1)}`].slice(0, last);
  const parts = labels.map((_, index) => (all ? counts[index] / all : 0));
  const mean = isRecent ? recent.rows / recent.batches : counters.batches ? counters.rows / counters.batches : null;
  return card(
    "Batch sizes",
    isRecent ? `last ${WINDOW} s` : "since it was loaded",
    "",
    h(
      "p",
      { class: "figures" },
      figure(mean === null ? format.NONE : format.rate(mean), "rows a batch"),
      figure(recent ? format.rate(recent.batches) : format.NONE, "batches/s"),
    ),
    charts.bars(labels, parts, {
      width,
      height: 150,
      sentence: `Batch sizes: ${labels.map((label, index) => `${label} rows ${format.percent(parts[index])}`).join(", ")}`,
    }),
    h("p", { class: "foot" }, "Part of the batches, by rows."),
  );
}

export function events(state, model) {
  if (state.events === null) return null;
  const found = state.events.filter((event) => event.model === model.name).slice(0, 12);
  if (!found.length) return null;
  return card(
    "Events",
    `the latest of ${model.name}`,
    "wide",
    h(
      "ol",
      { class: "events" },
      found.map((event) => {
        const fields = Object.entries(event.fields).map(([name, value]) => `${name} ${value}`);
        return h(
          "li",
          { "data-key": event.number },
          h("time", { datetime: new Date(event.at * 1000).toISOString() }, format.when(event.at)),
          h("span", { class: "kind" }, event.kind.replace(/_/g, " "), event.version ? ` v${event.version}` : ""),
          h(
            "span",
            { class: "why" },
            [event.reason, ...fields, event.who === "server" ? "" : `by ${event.who}`].filter(Boolean).join(" · "),
          ),
        );
      }),
    ),
  );
}
