"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // Theme: as the system has it, then light, then dark.
  const theme = get("theme");
  const themes = ["system", "light", "dark"];
  const setTheme = (name) => {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    theme.textContent = `Theme: ${name}`;
  };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const now = document.documentElement.dataset.theme || "system";
    setTheme(themes[(themes.indexOf(now) + 1) % themes.length]);
  });

  // Tables: a click on a head sorts, a second one turns the order; what is not known stays last.
  const keyOf = (row, column, numeric) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim();
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const sortBy = (table, head) => {
    const column = head.cellIndex, numeric = head.classList.contains("number");
    const down = head.getAttribute("aria-sort") === "ascending";
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => [keyOf(row, column, numeric), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return (numeric ? a - b : a.localeCompare(b)) * (down ? -1 : 1);
    });
    body.append(...keyed.map(([, row]) => row));
    for (const other of table.tHead.rows[0].cells) if (other.querySelector("button")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    get("said").textContent = `Sorted by ${head.querySelector("button").textContent}, ${down ? "descending" : "ascending"}.`;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const head of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      const name = head.firstChild;
      head.dataset.name = name.textContent;
      head.insertBefore(button, name);
      button.append(name);
      button.addEventListener("click", () => sortBy(table, head));
      if (!head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", "none");
    }
  }

  // Details are open on paper.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of closed) one.open = false; });

  const data = JSON.parse(get("data").textContent);
  if (!data) return;

  // Spectra: one moment of the run at a time, of all runs together or of one.
  const slider = get("step"), run = get("run"), logarithmic = get("log"), play = get("play"), plot = get("plot");
  const NS = "http://www.w3.org/2000/svg";
  const add = (parent, name, attributes, text) => {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };
  for (const unit of data.units) run.add(new Option(`run ${unit.index}: ${unit.name}`, unit.index));
  const chosen = () => data.units.find((unit) => String(unit.index) === run.value);
  const finite = (values) => values.flat(Infinity).filter((value) => value !== null);
  const short = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.01 || size >= 1e5)) return value.toExponential(0).replace("-", "−").replace("+", "");
    return String(Number(value.toPrecision(3))).replace("-", "−");
  };
  const ticksOf = (low, high, wanted) => {
    const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
    const size = [1, 2, 2.5, 5, 10].find((m) => m * power >= rough * 0.999) * power;
    const ticks = [];
    for (let k = Math.ceil(low / size - 1e-9); k <= high / size + 1e-9; k += 1) ticks.push(k * size);
    return ticks;
  };
  const scaleOf = (values, start, stop) => {
    const top = Math.max(1, ...values) * 1.05, positive = values.filter((value) => value > 0);
    if (!logarithmic.checked || !positive.length) {
      return { at: (v) => start + (v / top) * (stop - start), ticks: ticksOf(0, top, 5) };
    }
    const floor = Math.max(Math.min(...positive), top * 1e-6);
    const low = Math.log10(floor), high = Math.log10(top), ticks = [];
    for (let k = Math.ceil(low); k <= high; k += 1) ticks.push(10 ** k);
    return { at: (v) => start + ((Math.log10(Math.max(v, floor)) - low) / (high - low)) * (stop - start), ticks: ticks.length > 1 ? ticks : [floor, top] };
  };
  const draw = () => {
    const step = Number(slider.value), unit = chosen(), all = data.all;
    const lines = unit ? unit.values : all.middle;
    const width = Math.max(plot.clientWidth, 260), height = Math.max(220, Math.min(400, width * 0.6));
    const left = 52, right = width - 10, top = 10, bottom = height - 42;
    const y = scaleOf(finite(unit ? unit.values : [all.high, all.middle]), bottom, top);
    const x = (place) => left + ((place - 0.5) / data.size) * (right - left);
    const svg = document.createElementNS(NS, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("role", "img");
    for (const tick of y.ticks) {
      add(svg, "path", { class: "grid", d: `M${left} ${y.at(tick)}H${right}` });
      add(svg, "text", { x: left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, short(tick));
    }
    if (data.reference !== null) add(svg, "path", { class: "reference", d: `M${left} ${y.at(data.reference)}H${right}` });
    add(svg, "path", { class: "axis", d: `M${left} ${bottom}H${right}` });
    for (const tick of new Set([1, ...ticksOf(1, data.size, Math.min(8, width / 80)).filter((t) => Number.isInteger(t) && t > data.size / 20)])) {
      add(svg, "path", { class: "axis", d: `M${x(tick)} ${bottom}v4` });
      add(svg, "text", { x: x(tick), y: bottom + 17, "text-anchor": "middle" }, tick);
    }
    add(svg, "text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, "index of singular value, largest first");
    add(svg, "text", { transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "singular value");
    const points = (values) => values.map((v, i) => [v, data.index[i]]).filter(([v]) => v !== null).map(([v, i]) => `${x(i).toFixed(1)} ${y.at(v).toFixed(1)}`);
    const ink = add(svg, "g", { class: unit ? "series-2" : "series-0" });
    if (!unit) add(ink, "path", { class: "band", d: `M${[...points(all.high[step]), ...points(all.low[step]).reverse()].join("L")}Z` });
    const path = points(lines[step]);
    if (path.length) add(ink, "path", { class: "line", id: "spectrum", d: `M${path.join("L")}` });
    if (width / data.index.length > 5) for (const point of path) add(ink, "circle", { class: "marker", cx: point.split(" ")[0], cy: point.split(" ")[1], r: 2.6 });
    const where = `Moment ${step + 1} of ${data.sigmas.length}: noise σ = ${data.sigmas[step]}, timestep ${data.timesteps[step]}`;
    const most = finite(lines[step]);
    svg.setAttribute("aria-label", `${where}. ${most.length ? `Singular values from ${short(Math.max(...most))} down to ${short(Math.min(...most))}.` : "No spectrum is known."}`);
    plot.replaceChildren(svg);
    get("moment").textContent = where;
    slider.setAttribute("aria-valuetext", where);
    const numbers = get("numbers");
    numbers.replaceChildren();
    const told = [["phase", (unit || all).phases[step]], ...data.names.map((name, i) => [name, (unit || all).numbers[step]?.[i]])];
    for (const [name, value] of told) {
      if (value === undefined || value === "–") continue;
      const term = document.createElement("dt"), text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      numbers.append(term, text);
    }
    const image = unit && document.querySelector(`img[data-unit="${unit.index}"]`), picture = get("picture");
    picture.hidden = !image;
    if (image) {
      picture.src = image.src;
      picture.alt = image.alt;
      picture.classList.toggle("pixelated", image.classList.contains("pixelated"));
    }
  };
  const move = (by) => {
    slider.value = Math.min(Math.max(Number(slider.value) + by, 0), data.sigmas.length - 1);
    draw();
  };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === data.sigmas.length - 1) slider.value = 0;
    play.textContent = "Stop";
    draw();
    timer = setInterval(() => { move(1); if (Number(slider.value) === data.sigmas.length - 1) stop(); }, 600);
  });
  slider.addEventListener("input", () => { stop(); draw(); });
  run.addEventListener("change", draw);
  logarithmic.addEventListener("change", draw);
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    stop();
    move(by);
  });
  const choose = (unit) => {
    if (!data.units.some((one) => one.index === unit)) return;
    run.value = String(unit);
    draw();
    get("spectra").scrollIntoView({ behavior: still.matches ? "auto" : "smooth" });
    plot.focus({ preventScroll: true });
  };
  for (const button of document.querySelectorAll("button[data-choose]")) {
    if (!data.units.some((one) => String(one.index) === button.dataset.choose)) button.disabled = true;
    else button.addEventListener("click", () => choose(Number(button.dataset.choose)));
  }
  for (const panel of document.querySelectorAll("[data-step]")) {
    panel.addEventListener("click", () => { slider.value = panel.dataset.step; stop(); draw(); });
  }
  slider.max = data.sigmas.length - 1;
  slider.value = data.sigmas.length - 1;
  get("explorer").hidden = false;
  new ResizeObserver(draw).observe(plot);
  draw();
})();
