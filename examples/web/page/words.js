// Numbers as the page writes them.

/** 0.931 as `93.1 %`. */
export function percent(share) {
  const value = 100 * share;
  return `${value.toFixed(value >= 99.95 || value < 0.05 ? 0 : 1)}\u00a0%`;
}

/** Bytes as `29 kB` or `1.2 MB`. */
export function describeSize(bytes) {
  if (bytes < 1e6) return `${Math.ceil(bytes / 1e3)} kB`;
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
