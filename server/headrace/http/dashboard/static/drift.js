// How far the chosen version's live data is from its reference.

import * as charts from "./charts.js";
import { h } from "./dom.js";
import * as format from "./format.js";
import { card, pill } from "./models.js";

const QUALITY = {
  missing: "missing or NaN",
  infinite: "infinite",
  below: "below the reference’s range",
  above: "above the reference’s range",
  off_scale: "of another scale",
  unseen: "of an unseen category",
};

/** `drift`: the summary in the state. `detail`: its features, null until they have come. `picked`: the key of the feature shown, or "". */
export function section(drift, detail, picked, width, at) {
  if (!drift)
    return card(
      "Drift",
      "not watched",
      "wide",
      h(
        "p",
        { class: "foot" },
        "Nothing of this version is watched: it is not live, its model.toml says [drift] reference = 'off', the server runs with " +
          "--no-drift, or no tensor of it can be watched.",
      ),
    );
  if (drift.status === "learning") return learning(drift);
  const body =
    detail && detail.features.length
      ? compared(drift, detail, picked, width)
      : h("p", { class: "foot" }, `${format.plural(drift.seen_rows, "row")} counted; features are compared when the first window ends.`);
  return card("Drift", reference(drift), "wide drift", verdict(drift, at), alerts(detail), body, detail ? left(drift, detail) : null);
}

function learning(drift) {
  return card(
    "Drift",
    "no reference yet",
    "wide",
    h(
      "label",
      { class: "progress" },
      h("progress", { value: Math.min(drift.learnt_rows, drift.learn_rows), max: Math.max(drift.learn_rows, 1) }),
      `Learning reference: ${format.count(drift.learnt_rows)} of ${format.count(drift.learn_rows)} rows`,
    ),
    h("p", { class: "foot" }, "The first rows of this version become what later ones are compared with."),
  );
}

function reference(drift) {
  const { source, rows } = drift.reference;
  const origin = { learnt: "its own first", profile: "profile of" }[source] ?? `${source},`;
  return `reference: ${origin} ${format.count(rows)} rows`;
}

function verdict(drift, at) {
  const { window } = drift;
  if (!window) return null;
  const isBad = drift.status === "alert";
  const expected = drift.reference.accuracy;
  const hasDropped = window.accuracy !== null && expected !== null && window.accuracy < expected - 0.05;
  return h(
    "div",
    { class: "verdict" },
    fact(
      isBad ? "bad" : "good",
      drift.drifting ? `${drift.drifting} of ${drift.features}` : isBad ? "Alert" : "None",
      drift.drifting ? "features drift" : isBad ? "is still raised" : `of ${drift.features} features drifts`,
    ),
    fact("", window.excess === null ? format.NONE : `${format.times(window.excess)}×`, "worst PSI ÷ what chance allows"),
    window.accuracy !== null
      ? fact(
          hasDropped ? "bad" : "",
          format.percent(window.accuracy),
          `estimated accuracy${expected !== null ? `, reference ${format.percent(expected)}` : ""}`,
        )
      : null,
    fact("", format.count(window.rows), `rows in the latest window, ended ${format.age(at - window.ended)} ago`),
  );
}

function fact(kind, figure, words) {
  return h("p", { class: `fact ${kind}` }, h("strong", null, figure), h("span", null, words));
}

function alerts(detail) {
  if (!detail || !detail.alerts.length) return null;
  const sorted = [...detail.alerts].sort(
    (one, other) =>
      (other.kind === "accuracy") - (one.kind === "accuracy") || other.value / (other.critical || 1) - one.value / (one.critical || 1),
  );
  const line = (alert) =>
    h(
      "li",
      null,
      h("span", null, alert.text),
      h("span", { class: "quiet" }, ` ${format.when(alert.at)}, after ${format.count(alert.rows)} rows`),
    );
  const [first, rest] = [sorted.slice(0, 3), sorted.slice(3)];
  return h(
    "div",
    { class: "alerts" },
    h("ul", null, first.map(line)),
    rest.length
      ? h("details", null, h("summary", null, `${format.plural(rest.length, "more alert")}`), h("ul", null, rest.map(line)))
      : null,
  );
}

function compared(drift, detail, picked, width) {
  const feature = detail.features.find((each) => each.key === picked) ?? detail.features[0];
  // As the style sheet has it.
  const isWide = matchMedia("(min-width: 1240px)").matches;
  const half = isWide ? Math.floor((width - 20) * 0.43) : width;
  return h("div", { class: "compared" }, table(detail, feature), chosen(detail, feature, half));
}

function table(detail, feature) {
  return h(
    "div",
    { class: "features", tabindex: "0", role: "region", "aria-label": "Features, the worst first" },
    h(
      "table",
      null,
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          ["Feature", "× chance", "PSI", "by chance", "Windows"].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        null,
        detail.features.map((each) =>
          h(
            "tr",
            { "data-key": each.key, class: `${each.is_raised ? "bad" : ""} ${each === feature ? "picked" : ""}`.trim() },
            h(
              "th",
              { scope: "row" },
              h("button", { type: "button", "data-feature": each.key, "aria-pressed": each === feature ? "true" : "false" }, each.title),
              h("span", { class: "side" }, each.side),
            ),
            h("td", { class: "times" }, charts.excessBar(each.excess), h("span", null, format.times(each.excess))),
            h("td", null, format.score(each.psi)),
            h("td", { class: "quiet" }, format.score(each.psi_critical)),
            h("td", null, charts.strip(each.history, each.psi_critical)),
          ),
        ),
      ),
    ),
  );
}

function chosen(detail, feature, width) {
  const numbers = [
    ["JS", feature.js],
    ["KS", feature.ks],
    ["Wasserstein", feature.wasserstein],
  ].filter(([, value]) => value !== null);
  const quality = Object.entries(feature.quality).map(([problem, count]) => `${format.count(count)} ${QUALITY[problem] ?? problem}`);
  const last = detail.windows.at(-1);
  const accuracies = detail.windows.map((window) => window.accuracy);
  return h(
    "div",
    { class: "chosen", "aria-live": "off" },
    h(
      "h4",
      null,
      feature.title,
      feature.is_raised ? pill("bad", "alert") : feature.is_drifting ? pill("warn", "drifting") : pill("good", "no drift"),
    ),
    h(
      "p",
      { class: "keys" },
      h("span", { class: "key was" }, "reference"),
      h("span", { class: "key live" }, "latest window"),
      h("span", null, feature.labels ? "part of the rows, by category" : "part of the rows, by value"),
    ),
    charts.compare(feature, { width, height: 170 }),
    h("h5", null, "PSI over windows"),
    charts.overWindows(feature.history, feature.psi_critical, detail.windows, {
      width,
      height: 120,
      label: "PSI",
      limitName: "what chance allows",
    }),
    accuracies.some((value) => value !== null)
      ? [
          h("h5", null, "Estimated accuracy over windows, without labels"),
          charts.overWindows(accuracies, last.reference_accuracy, detail.windows, {
            width,
            height: 110,
            label: "Estimated accuracy",
            limitName: "reference",
            isPart: true,
          }),
        ]
      : null,
    h(
      "p",
      { class: "foot" },
      [
        `p ${feature.p_value !== null && feature.p_value < 1e-4 ? "< 0.0001" : feature.p_value?.toPrecision(2)}`,
        ...numbers.map(([name, value]) => `${name} ${format.score(value)}`),
        feature.slow >= 0.005 ? `slow drift ${format.percent(feature.slow, 0)} of an alarm` : "",
      ]
        .filter(Boolean)
        .join(" · "),
    ),
    h(
      "p",
      { class: "foot quality" },
      quality.length
        ? `Rows since it is live: ${quality.join(", ")}.`
        : "No row had a missing, infinite or unseen value or one outside the reference’s range.",
    ),
  );
}

function left(drift, detail) {
  const parts = [`${format.count(drift.seen_rows)} rows counted`];
  if (drift.skipped_rows) parts.push(`${format.count(drift.skipped_rows)} left out to stay within the budget`);
  if (drift.dropped_rows) parts.push(`${format.count(drift.dropped_rows)} lost, as too many waited`);
  return h("p", { class: "foot" }, `${parts.join(", ")}. `, detail.left_out.length ? `Not watched: ${detail.left_out.join("; ")}.` : "");
}
