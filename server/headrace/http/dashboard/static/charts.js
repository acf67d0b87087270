// Charts as SVG, drawn for a width in pixels so that text keeps its size. Each has axes with units, and a sentence for who cannot see it.

import { svg } from "./dom.js";
import * as format from "./format.js";

const TOP = 10;
const FOOT = 20;

function frame(width, height, sentence, ...parts) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", height, role: "img", "aria-label": sentence }, ...parts);
}

function text(x, y, anchor, words) {
  return svg("text", { x: round(x), y: round(y), "text-anchor": anchor }, words);
}

function line(x1, y1, x2, y2, kind) {
  return svg("line", { class: kind, x1: round(x1), y1: round(y1), x2: round(x2), y2: round(y2) });
}

function round(number) {
  return Math.round(number * 10) / 10;
}

/** The next number that reads well, and its half too. */
export function nice(number) {
  if (!(number > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= number * 0.999);
}

function yAxis(left, right, top, floor, largest, write) {
  return [0, 0.5, 1].map((part) => {
    const y = floor - part * (floor - top);
    return [line(left, y, right, y, part ? "grid" : "axis"), text(left - 6, y + 4, "end", write(part * largest))];
  });
}

/** `points`: {clock, [name]}, the newest last. Time runs to now, `seconds` of it. */
export function overTime(points, { width, height, now, seconds, names, label, unit }) {
  const [left, right, floor] = [44, width - 8, height - FOOT];
  const largest = nice(Math.max(...points.flatMap((point) => names.map((name) => point[name])), 0));
  const x = (clock) => right - ((now - clock) / seconds) * (right - left);
  const y = (value) => floor - (value / largest) * (floor - TOP);
  const kept = points.filter((point) => now - point.clock <= seconds);
  const paths = names.map((name) => {
    const path = kept.map((point, index) => `${index ? "L" : "M"}${round(x(point.clock))} ${round(y(point[name]))}`).join("");
    // A line along the axis would only look like one.
    if (!kept.some((point) => point[name] > 0) && name !== names[0]) return null;
    if (!kept.length) return null;
    const area = `${path}L${round(x(kept.at(-1).clock))} ${floor}L${round(x(kept[0].clock))} ${floor}Z`;
    return [svg("path", { class: `area ${name}`, d: area }), svg("path", { class: `path ${name}`, d: path })];
  });
  const last = kept.at(-1);
  const sentence = `${label} over the last ${format.age(seconds)}${last ? `, now ${format.rate(last[names[0]])} ${unit}` : ""}`;
  return frame(width, height, sentence, yAxis(left, right, TOP, floor, largest, format.compact), paths.reverse(), [
    text(left, height - 5, "start", `${format.age(seconds)} ago`),
    text(right, height - 5, "end", "now"),
    text((left + right) / 2, height - 5, "middle", unit),
  ]);
}

/** `rows`: {name, p50, p99} in seconds, or null. On a logarithmic axis, as stages differ by powers of ten. */
export function latencies(rows, { width }) {
  const [left, right, step, top] = [62, width - 124, 30, 22];
  const seen = rows.flatMap((row) => [row.p50, row.p99]).filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.min(...seen, 1e-3)));
  const high = Math.max(Math.ceil(Math.log10(Math.max(...seen, 1e-3)) - 1e-9), low + 2);
  const x = (value) => left + ((Math.log10(Math.max(value, 10 ** low)) - low) / (high - low)) * (right - left);
  const floor = top + rows.length * step;
  const ticks = [];
  for (let power = low; power <= high; power++) {
    const at = x(10 ** power);
    ticks.push(line(at, top, at, floor, "grid"), text(at, floor + 15, "middle", format.duration(10 ** power).replace(".0", "")));
  }
  const marks = rows.map((row, index) => {
    const y = top + (index + 0.5) * step;
    const name = text(left - 8, y + 4, "end", row.name);
    if (row.p50 === null) return [name, text(width - 4, y + 4, "end", format.NONE)];
    return [
      name,
      line(x(row.p50), y, x(row.p99), y, "span"),
      svg("circle", { class: "p50", cx: round(x(row.p50)), cy: y, r: 4.5 }),
      svg("rect", { class: "p99", x: round(x(row.p99) - 1.5), y: y - 7, width: 3, height: 14, rx: 1.5 }),
      text(width - 62, y + 4, "end", format.duration(row.p50)),
      text(width - 4, y + 4, "end", format.duration(row.p99)),
    ];
  });
  const sentence = rows.map((row) => `${row.name}: p50 ${format.duration(row.p50)}, p99 ${format.duration(row.p99)}`).join("; ");
  return frame(width, floor + FOOT, sentence, ticks, marks, [
    text(width - 62, top - 8, "end", "p50"),
    text(width - 4, top - 8, "end", "p99"),
  ]);
}

/** `parts` of a whole, one bar a label. */
export function bars(labels, parts, { width, height, sentence }) {
  const [left, right, floor] = [44, width - 8, height - FOOT];
  const largest = scaleOf(parts);
  const step = (right - left) / labels.length;
  const skip = Math.ceil((Math.max(...labels.map((label) => label.length)) * 7 + 6) / step);
  return frame(
    width,
    height,
    sentence,
    yAxis(left, right, TOP, floor, largest, whole),
    labels.map((label, index) => [
      bar(
        left + (index + 0.14) * step,
        floor,
        0.72 * step,
        (parts[index] / largest) * (floor - TOP),
        "live",
        `${label}: ${format.percent(parts[index])}`,
      ),
      index % skip ? null : text(left + (index + 0.5) * step, height - 5, "middle", label),
    ]),
  );
}

function bar(x, floor, width, size, kind, title) {
  const height = Math.max(size, size > 0 ? 1 : 0);
  return svg(
    "rect",
    { class: kind, x: round(x), y: round(floor - height), width: round(width), height: round(height), rx: Math.min(2, round(height) / 2) },
    svg("title", null, title),
  );
}

function whole(part) {
  return part > 0 && part < 0.1 && (part * 100) % 1 ? `${(part * 100).toFixed(1)} %` : `${Math.round(part * 100)} %`;
}

function scaleOf(parts) {
  return Math.min(nice(Math.max(...parts, 0.01)), 1);
}

/** A feature's bins, live beside reference. */
export function compare(feature, { width, height }) {
  const [left, right, floor] = [44, width - 8, height - FOOT];
  const largest = scaleOf([...feature.expected, ...feature.live]);
  const count = feature.live.length;
  const step = (right - left) / count;
  const pairs = feature.live.map((live, index) => {
    const name = binName(feature, index);
    const size = (part) => (part / largest) * (floor - TOP);
    return [
      bar(
        left + (index + 0.1) * step,
        floor,
        0.38 * step,
        size(feature.expected[index]),
        "was",
        `${name}: ${format.percent(feature.expected[index])} in the reference`,
      ),
      bar(left + (index + 0.52) * step, floor, 0.38 * step, size(live), "live", `${name}: ${format.percent(live)} in the latest window`),
    ];
  });
  const sentence =
    `${feature.title}: ` +
    feature.live
      .map((live, index) => `${binName(feature, index)} ${format.percent(live)}, reference ${format.percent(feature.expected[index])}`)
      .join("; ");
  return frame(
    width,
    height,
    sentence,
    yAxis(left, right, TOP, floor, largest, whole),
    pairs,
    binTicks(feature, left, step, height, right),
  );
}

function binName(feature, index) {
  if (feature.labels) return feature.labels[index];
  const { edges } = feature;
  if (!edges.length) return "all";
  if (index === 0) return `up to ${format.value(edges[0])}`;
  return index < edges.length ? `${format.value(edges[index - 1])} to ${format.value(edges[index])}` : `over ${format.value(edges.at(-1))}`;
}

function binTicks(feature, left, step, height, right) {
  const y = height - 5;
  if (!feature.labels) return edgeTicks(feature.edges, left, step, y);
  const longest = Math.max(...feature.labels.map((label) => Math.min(label.length, 12)));
  const skip = Math.max(Math.ceil((longest * 6.5 + 6) / step), 1);
  return feature.labels.map((label, index) => {
    if (index % skip) return null;
    const at = Math.min(left + (index + 0.5) * step, right);
    return text(at, y, "middle", label.length > 12 ? `${label.slice(0, 11)}…` : label);
  });
}

/** At the borders between bins, as many as fit. */
function edgeTicks(edges, left, step, y) {
  let free = -Infinity;
  return edges.map((edge, index) => {
    const words = format.value(edge);
    const [at, half] = [left + (index + 1) * step, words.length * 3.4 + 4];
    if (at - half < free) return null;
    free = at + half;
    return text(at, y, "middle", words);
  });
}

/** One value a window, with the dashed line that it is held against. `isPart`: percent, not from 0. */
export function overWindows(values, limit, windows, { width, height, label, limitName, isPart = false }) {
  const [left, right, floor] = [50, width - 8, height - FOOT];
  const shown = [...values, limit].filter((value) => value !== null && value !== undefined);
  let [low, high] = [0, nice(Math.max(...shown, 1e-3))];
  if (isPart)
    [low, high] = [Math.max(Math.floor(Math.min(...shown) * 20) / 20 - 0.05, 0), Math.min(Math.ceil(Math.max(...shown) * 20) / 20, 1)];
  const y = (value) => floor - ((value - low) / (high - low || 1)) * (floor - TOP);
  const x = (index) => (values.length < 2 ? (left + right) / 2 : left + 5 + (index / (values.length - 1)) * (right - left - 10));
  const read = (value) => (isPart ? format.percent(value) : format.score(value));
  const write = (part) => (isPart ? `${Number(((low + part) * 100).toFixed(1))} %` : format.value(part));
  const dots = values.map((value, index) => {
    if (value === null) return null;
    const title = `${format.when(windows[index].ended)}, ${format.count(windows[index].rows)} rows: ${read(value)}`;
    const beyond = limit !== null && (isPart ? false : value > limit);
    return svg(
      "circle",
      { class: beyond ? "dot beyond" : "dot", cx: round(x(index)), cy: round(y(value)), r: values.length > 30 ? 2 : 3 },
      svg("title", null, title),
    );
  });
  const path = values
    .map((value, index) =>
      value === null ? "" : `${index && values[index - 1] !== null ? "L" : "M"}${round(x(index))} ${round(y(value))}`,
    )
    .join("");
  const sentence = `${label} over ${format.plural(values.length, "window")}, the latest ${read(values.at(-1))}`;
  return frame(
    width,
    height,
    sentence,
    yAxis(left, right, TOP, floor, high - low, write),
    limit === null || limit === undefined
      ? null
      : [line(left, y(limit), right, y(limit), "limit"), text(right, y(limit) + (y(limit) < TOP + 12 ? 12 : -5), "end", limitName)],
    svg("path", { class: "path", d: path }),
    dots,
    windows.length
      ? [
          text(left, height - 5, "start", format.moment(windows[0].ended)),
          windows.length > 1 ? text(right, height - 5, "end", format.moment(windows.at(-1).ended)) : null,
        ]
      : null,
  );
}

/** How many times chance allows a value is, as one of six shades. */
export function shade(excess) {
  if (excess === null || excess === undefined || excess < 0.5) return 0;
  return excess < 1 ? 1 : excess < 2 ? 2 : excess < 5 ? 3 : excess < 15 ? 4 : 5;
}

/** A cell a window, the newest at the right. */
export function strip(history, critical, most = 12) {
  const cells = history.slice(-most);
  const shift = (most - cells.length) * 5;
  return svg(
    "svg",
    { class: "strip", viewBox: `0 0 ${most * 5} 14`, width: most * 5, height: 14, "aria-hidden": "true" },
    cells.map((psi, index) =>
      svg("rect", { class: `heat heat-${shade(critical ? psi / critical : 0)}`, x: shift + index * 5, y: 1, width: 4, height: 12, rx: 1 }),
    ),
  );
}

/** A bar as long as the excess, on a logarithmic scale with chance in the middle. */
export function excessBar(excess) {
  const [width, most] = [64, 100];
  const part = (value) => Math.min(Math.max(Math.log10(Math.max(value, 1 / most) * most) / (2 * Math.log10(most)), 0), 1);
  return svg("svg", { class: "excess", viewBox: `0 0 ${width} 14`, width, height: 14, "aria-hidden": "true" }, [
    svg("rect", { class: "track", x: 0, y: 4, width, height: 6, rx: 3 }),
    svg("rect", { class: `heat heat-${Math.max(shade(excess), 1)}`, x: 0, y: 4, width: round(part(excess) * width), height: 6, rx: 3 }),
    line(width / 2, 1, width / 2, 13, "chance"),
  ]);
}
