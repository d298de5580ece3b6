// Figures as they are read: never more digits than they are worth.

export function figure(value) {
  if (value === undefined || value === null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toFixed(size >= 1e7 ? 1 : 2)} M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  if (size >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en-US");
  return value.toFixed(size >= 10 ? 1 : 2);
}

export function seconds(value) {
  if (value === undefined || value === null || Number.isNaN(value)) return "–";
  if (value < 0.0995) return `${(value * 1e3).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 1) return `${Math.round(value * 1e3)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`;
}

export const percent = (part) => (part === undefined || part === null ? "–" : `${Math.round(part * 100)} %`);

export function bytes(count) {
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (count >= size) return `${(count / size).toFixed(1)} ${unit}`;
  }
  return `${count ?? 0} B`;
}

export function clock(time) {
  return new Date(time * 1000).toLocaleTimeString("en-GB");
}

export function ago(time, now = Date.now() / 1000) {
  const gone = Math.max(0, now - time);
  if (gone < 5) return "just now";
  if (gone < 60) return `${Math.floor(gone)} s ago`;
  if (gone < 3600) return `${Math.floor(gone / 60)} min ago`;
  if (gone < 86400) return `${Math.floor(gone / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString("en-GB");
}

// The value below which a part of the others lies; undefined without values.
export function quantile(values, part) {
  if (!values.length) return undefined;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(part * sorted.length) - 1 < 0 ? 0 : Math.ceil(part * sorted.length) - 1)];
}

// "expert-10" after "expert-9".
export const byName = (a, b) => a.localeCompare(b, "en", { numeric: true });
