// Lines of equal heat over a grid of values: the isotherms.

const FINEST = 8, MOST = 120_000; // points from one cell to the next, and in all

const ease = (t) => t * t * (3 - 2 * t);

// The field between the cells' centres, smooth. `rows`: lists of values, equally long.
function smooth(rows) {
  const across = rows[0].length, down = rows.length;
  const fine = Math.max(2, Math.min(FINEST, Math.floor(Math.sqrt(MOST / (across * down)))));
  const width = across * fine + 2, height = down * fine + 2; // one point beyond each edge, so that lines reach it
  const values = new Float32Array(width * height);
  for (let y = 0; y < height; y++) {
    const fy = Math.min(down - 1, Math.max(0, (y - 0.5) / fine - 0.5));
    const y0 = Math.floor(fy), y1 = Math.min(down - 1, y0 + 1), ty = ease(fy - y0);
    for (let x = 0; x < width; x++) {
      const fx = Math.min(across - 1, Math.max(0, (x - 0.5) / fine - 0.5));
      const x0 = Math.floor(fx), x1 = Math.min(across - 1, x0 + 1), tx = ease(fx - x0);
      const top = rows[y0][x0] + (rows[y0][x1] - rows[y0][x0]) * tx;
      const low = rows[y1][x0] + (rows[y1][x1] - rows[y1][x0]) * tx;
      values[y * width + x] = top + (low - top) * ty;
    }
  }
  return { fine, width, height, values };
}

// One Path2D for each level, in units of cells. Marching squares: of each square of four points, the corners above the
// level say which sides the line crosses.
export function isotherms(rows, levels) {
  if (!rows.length || !rows[0].length) return levels.map(() => new Path2D());
  const { fine, width, height, values } = smooth(rows);
  return levels.map((level) => {
    const path = new Path2D();
    for (let y = 0; y + 1 < height; y++) {
      for (let x = 0; x + 1 < width; x++) {
        const i = y * width + x;
        const a = values[i], b = values[i + 1], c = values[i + width + 1], d = values[i + width];
        const kind = (a > level) | ((b > level) << 1) | ((c > level) << 2) | ((d > level) << 3);
        if (kind === 0 || kind === 15) continue;
        const part = (from, to) => (level - from) / (to - from);
        const sides = {
          top: () => [x + part(a, b), y], right: () => [x + 1, y + part(b, c)],
          low: () => [x + part(d, c), y + 1], left: () => [x, y + part(a, d)],
        };
        for (const [from, to] of CASES[kind]) {
          const [x0, y0] = sides[from](), [x1, y1] = sides[to]();
          path.moveTo((x0 - 0.5) / fine, (y0 - 0.5) / fine);
          path.lineTo((x1 - 0.5) / fine, (y1 - 0.5) / fine);
        }
      }
    }
    return path;
  });
}

const CASES = {
  1: [["left", "top"]], 2: [["top", "right"]], 3: [["left", "right"]], 4: [["right", "low"]],
  5: [["left", "top"], ["right", "low"]], 6: [["top", "low"]], 7: [["left", "low"]], 8: [["low", "left"]],
  9: [["low", "top"]], 10: [["top", "right"], ["low", "left"]], 11: [["low", "right"]], 12: [["right", "left"]],
  13: [["right", "top"]], 14: [["top", "left"]],
};
