// The three charts. Their numbers are in charts-data.js, which docs/make_site.py writes.
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";

  function element(name, attributes = {}, children = []) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function shape(parent, name, attributes, text = "") {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    parent.append(made);
    return made;
  }

  function drawing(width, height) {
    const made = document.createElementNS(SVG, "svg");
    made.setAttribute("viewBox", `0 0 ${width} ${height}`);
    made.setAttribute("role", "img");
    return made;
  }

  const withCommas = (value) => value.toLocaleString("en-US");

  // A slider over `values`; `changed` is called with the index. Returns its row and the input.
  function slider(name, values, start, changed, shown = withCommas) {
    const output = element("output");
    const input = element("input", {
      type: "range", min: 0, max: values.length - 1, step: 1, value: start,
    });
    const update = () => {
      const text = shown(values[+input.value]);
      output.textContent = text;
      input.setAttribute("aria-valuetext", text);
      changed(+input.value);
    };
    input.addEventListener("input", update);
    const label = element("label", { class: "slider" }, [element("span", {}, [name]), input, output]);
    return { label, input, update };
  }

  // --- Goodness of positives and negatives over training ---

  function goodness(place, data) {
    const [width, height, left, bottom, top] = [640, 300, 8, 44, 26];
    const svg = drawing(width, height);
    let most = 1;
    const [first, last] = [data.edges[0], data.edges.at(-1)];
    const x = (value) => left + ((value - first) / (last - first)) * (width - 2 * left);
    const y = (count) => height - bottom - (count / most) * (height - bottom - top);
    const mean = (counts) => {
      const total = counts.reduce((sum, count) => sum + count, 0);
      const middles = counts.map((count, i) => (count * (data.edges[i] + data.edges[i + 1])) / 2);
      return middles.reduce((sum, value) => sum + value, 0) / total;
    };

    function draw(moment) {
      svg.replaceChildren();
      most = Math.max(...data.positive[moment], ...data.negative[moment]);
      const said = [];
      for (const kind of ["positive", "negative"]) {
        const counts = data[kind][moment];
        let path = `M${x(first)},${y(0)}`;
        counts.forEach((count, i) => {
          path += `L${x(data.edges[i])},${y(count)}L${x(data.edges[i + 1])},${y(count)}`;
        });
        shape(svg, "path", { d: `${path}L${x(last)},${y(0)}Z`, class: `area ${kind}` });
        said.push(`mean goodness of ${kind} inputs ${mean(counts).toFixed(2)}`);
      }
      shape(svg, "line", { x1: left, x2: width - left, y1: y(0), y2: y(0), class: "axis" });
      if (data.theta <= last) {
        const threshold = x(data.theta);
        shape(svg, "line", { x1: threshold, x2: threshold, y1: top - 6, y2: y(0), class: "mark" });
        const side = threshold > width * 0.75 ? "end" : "start";
        const shift = side === "end" ? -6 : 6;
        shape(svg, "text", { x: threshold + shift, y: top + 4, "text-anchor": side }, "threshold");
      }
      const step = [0.1, 0.25, 0.5, 1, 2, 5, 10].find((size) => (last - first) / size <= 8) || 20;
      for (let tick = Math.ceil(first / step) * step; tick <= last + 1e-9; tick += step) {
        const anchor = x(tick) < 20 ? "start" : x(tick) > width - 20 ? "end" : "middle";
        const text = String(Math.round(tick * 100) / 100);
        shape(svg, "text", { x: x(tick), y: height - bottom + 18, "text-anchor": anchor }, text);
      }
      const middle = { x: width / 2, y: height - 4, "text-anchor": "middle" };
      shape(svg, "text", middle, "goodness of the layer (mean of its squared outputs)");
      svg.setAttribute("aria-label", `Histograms after ${data.steps[moment]} training steps: ${said.join(", ")}`);
      legend.lastChild.textContent = said.join("; ") + ".";
    }

    const legend = element("p", { class: "legend" }, [
      element("span", { class: "key positive" }, ["positive inputs"]),
      element("span", { class: "key negative" }, ["negative inputs"]),
      element("span"),
    ]);
    const control = slider("training steps", data.steps, 0, draw);
    place.append(control.label, svg, legend);
    control.update();
  }

  // --- One digit, ten labels, each layer's goodness ---

  // Goodness of every label in every layer, as the module computes it. pixels: rows from 0 to 1.
  function labelGoodness({ layers, scale }, pixels) {
    const normalised = (values) => {
      const size = Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
      return values.map((value) => value / (size + 1e-8));
    };
    const found = layers.map(() => []);
    for (let label = 0; label < 10; label++) {
      let h = pixels.flat();
      for (let i = 0; i < 10; i++) h[i] = i === label ? scale : 0;
      layers.forEach(({ weight, bias }, number) => {
        const x = normalised(h);
        h = weight.map((row, j) => Math.max(0, row.reduce((sum, w, i) => sum + w * x[i], bias[j])));
        found[number].push(h.reduce((sum, value) => sum + value * value, 0) / h.length);
      });
    }
    return found;
  }

  // A field to draw on, four dots to a pixel's side; `changed` is called with the pixels.
  function canvas(side, changed) {
    const dots = 4 * side;
    const board = element("canvas", {
      width: 160, height: 160, tabindex: 0, "aria-label": "Draw a digit here with mouse or finger",
    });
    const context = board.getContext("2d");
    let on = new Set();
    const pixels = () => Array.from({ length: side }, (_, y) => Array.from({ length: side }, (_, x) => {
      let count = 0;
      for (let i = 0; i < 16; i++) count += on.has((4 * y + (i >> 2)) * dots + 4 * x + (i & 3));
      return count / 16;
    }));
    const paint = (event) => {
      if (!event.buttons) return;
      event.preventDefault();
      const box = board.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * dots;
      const y = ((event.clientY - box.top) / box.height) * dots;
      for (let row = 0; row < dots; row++) for (let column = 0; column < dots; column++) {
        if (Math.hypot(column + 0.5 - x, row + 0.5 - y) > 1.7) continue;
        on.add(row * dots + column);
        context.fillRect((column * 160) / dots, (row * 160) / dots, 160 / dots, 160 / dots);
      }
      changed(pixels());
    };
    const clear = () => {
      on = new Set();
      context.fillStyle = "#000";
      context.fillRect(0, 0, 160, 160);
      context.fillStyle = "#fff";
    };
    board.addEventListener("pointerdown", paint);
    board.addEventListener("pointermove", paint);
    clear();
    return { board, clear };
  }

  function digits(place, data) {
    const image = element("div");
    const panels = element("div", { class: "panels" });
    const answer = element("p", { "aria-live": "polite" });

    function picture(pixels, size) {
      const svg = drawing(8, 8);
      svg.setAttribute("width", size);
      svg.setAttribute("height", size);
      svg.setAttribute("shape-rendering", "crispEdges");
      shape(svg, "rect", { width: pixels[0].length, height: pixels.length, fill: "#000" });
      pixels.forEach((row, y) => row.forEach((value, x) => {
        const light = Math.round(255 * value);
        const fill = `rgb(${light},${light},${light})`;
        if (light) shape(svg, "rect", { x, y, width: 1, height: 1, fill });
      }));
      svg.setAttribute("viewBox", `0 0 ${pixels[0].length} ${pixels.length}`);
      return svg;
    }

    function bars(title, values, label) {
      const [width, height, bottom] = [250, 150, 24];
      const svg = drawing(width, height);
      const most = Math.max(...values);
      const best = values.indexOf(most);
      values.forEach((value, i) => {
        const tall = (value / most) * (height - bottom - 8);
        const at = { x: 4 + i * 24.5, y: height - bottom - tall, width: 20, height: tall };
        shape(svg, "rect", { ...at, class: i === best ? "bar best" : "bar" });
        const text = { x: 14 + i * 24.5, y: height - 6, "text-anchor": "middle" };
        shape(svg, "text", { ...text, class: i === label ? "true" : "" }, String(i));
      });
      svg.setAttribute("aria-label", `${title}: highest for label ${best}`);
      return element("figure", {}, [element("figcaption", {}, [title]), svg]);
    }

    function draw(chosen) {
      const { label, predicted, pixels, goodness: layers } = data[chosen];
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
      show(pixels, layers, label);
      image.firstChild.setAttribute("aria-label", `A handwritten ${label}`);
      const right = predicted === label ? "which is right" : `but it is a ${label}`;
      answer.textContent = `The network reads a ${predicted}, ${right}. ` +
        "Below each bar is the label that was tried; the true one is bold.";
    }

    function drawn(pixels) {
      buttons.forEach((button) => button.setAttribute("aria-pressed", false));
      const layers = labelGoodness(window.chartData.network, pixels);
      const sums = show(pixels, layers, -1);
      image.firstChild.setAttribute("aria-label", "What you drew, in 8x8 pixels");
      answer.textContent = `A smaller network reads a ${sums.indexOf(Math.max(...sums))}. ` +
        "It knows digits that fill the field from top to bottom.";
    }

    function show(pixels, layers, label) {
      image.replaceChildren(picture(pixels, 150));
      const sums = layers[0].map((_, i) => layers.reduce((sum, layer) => sum + layer[i], 0));
      panels.replaceChildren(
        ...layers.map((values, i) => bars(`layer ${i + 1}`, values, label)),
        bars("all layers", sums, label),
      );
      return sums;
    }

    const buttons = data.map((digit, i) => {
      const small = picture(digit.pixels, 40);
      small.setAttribute("aria-hidden", "true");
      small.removeAttribute("role");
      const button = element("button", { "aria-label": `example ${i + 1}, a ${digit.label}` }, [small]);
      button.addEventListener("click", () => draw(i));
      return button;
    });
    const choices = element("div", { class: "choices", role: "group", "aria-label": "Choose a digit" }, buttons);
    const { board, clear } = canvas(window.chartData.network.side, drawn);
    const again = element("button", {}, ["clear"]);
    again.addEventListener("click", () => { clear(); draw(0); });
    const field = element("div", { class: "choices field" }, [board, element("p", {}, ["or draw one"]), again]);
    place.append(choices, field, answer, element("div", { class: "digit" }, [image, panels]));
    draw(0);
  }

  // --- Memory of every arm ---

  function memory(place, data) {
    const axes = [data.depths, data.widths, data.images];
    const start = [data.depths.indexOf(47), data.widths.indexOf(2000), data.images.indexOf(5000)];
    const chosen = [...start];
    const rows = data.arms.map((arm) => {
      const bar = element("span", { class: "fill", style: `background:${arm.colour}` });
      const number = element("span", { class: "number" });
      const row = element("li", { class: arm.pale ? "pale" : "" }, [
        element("span", { class: "name" }, [arm.title]),
        element("span", { class: "track" }, [bar]),
        number,
      ]);
      return { arm, row, bar, number };
    });
    const list = element("ul", { class: "bars" }, rows.map(({ row }) => row));
    const summary = element("p", { "aria-live": "polite" });

    function draw() {
      const [depth, width, images] = chosen;
      const at = (depth * data.widths.length + width) * data.images.length + images;
      const most = Math.max(...rows.map(({ arm }) => arm.peaks[at]));
      for (const { arm, bar, number } of rows) {
        bar.style.width = `${(100 * arm.peaks[at]) / most}%`;
        number.textContent = `${withCommas(arm.peaks[at] < 10 ? arm.peaks[at] : Math.round(arm.peaks[at]))} MB`;
      }
      const ours = rows.filter(({ arm }) => !arm.pale);
      const least = ours.reduce((a, b) => (a.arm.peaks[at] <= b.arm.peaks[at] ? a : b)).arm;
      summary.textContent = `The least memory here: ${least.title}. The longest bar is ` +
        `${withCommas(Math.round(most))} MB; the scale follows it.`;
    }

    const sliders = ["hidden layers", "units per layer", "images per step"].map((name, i) =>
      slider(name, axes[i], start[i], (index) => { chosen[i] = index; draw(); }));
    place.append(...sliders.map(({ label }) => label), list, summary);
    sliders.forEach(({ update }) => update());
  }

  const charts = { goodness, digits, memory };
  for (const place of document.querySelectorAll("[data-chart]")) {
    const name = place.dataset.chart;
    charts[name](place, window.chartData[name]);
  }
})();
