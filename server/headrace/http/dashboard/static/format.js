// Numbers and times as people read them.

export const NONE = "–";

export function count(value) {
  return value === null || value === undefined ? NONE : Math.round(value).toLocaleString("en-US");
}

/** Of a rate: three digits are enough, and none for nothing. */
export function rate(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0";
  if (value < 0.095) return value.toFixed(2);
  return value < 9.95 ? value.toFixed(1) : count(value);
}

export function compact(value) {
  return value === null || value === undefined
    ? NONE
    : Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 }).format(value);
}

/** A value of a feature, whatever its scale. */
export function value(number) {
  if (number === null || number === undefined) return NONE;
  const size = Math.abs(number);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return number.toExponential(1).replace("e+", "e");
  return String(Number(number.toPrecision(3)));
}

export function score(number) {
  if (number === null || number === undefined) return NONE;
  return number >= 10 ? number.toFixed(1) : number >= 1 ? number.toFixed(2) : number.toFixed(3);
}

export function percent(part, digits = 1) {
  return part === null || part === undefined ? NONE : `${(part * 100).toFixed(digits)} %`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  const [size, unit] = seconds < 0.9995e-3 ? [1e6, "µs"] : seconds < 0.9995 ? [1e3, "ms"] : [1, "s"];
  const number = seconds * size;
  return `${number < 9.95 ? number.toFixed(1) : Math.round(number)} ${unit}`;
}

export function age(seconds) {
  const s = Math.max(Math.round(seconds), 0);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min${s % 60 ? ` ${s % 60} s` : ""}`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function bytes(size) {
  if (!size) return NONE;
  const power = Math.min(Math.floor(Math.log2(size) / 10), 4);
  return `${Number((size / 2 ** (10 * power)).toPrecision(3))} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

export function moment(at) {
  return new Date(at * 1000).toLocaleTimeString("en-GB");
}

/** With the day where it is not today. */
export function when(at) {
  const date = new Date(at * 1000);
  return date.toDateString() === new Date().toDateString() ? moment(at) : `${date.toLocaleDateString("en-CA")} ${moment(at)}`;
}

export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** How many times of something. */
export function times(number) {
  if (number === null || number === undefined) return NONE;
  return number >= 9.95 ? count(number) : number.toFixed(number < 0.995 ? 2 : 1);
}
