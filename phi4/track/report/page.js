"use strict";
(() => {
  const page = JSON.parse(document.getElementById("charts").textContent);
  const config = {
    responsive: true, displaylogo: false, displayModeBar: "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  const axisTitles = { tokens: "tokens", step: "step", seconds: page.time.unit + " since the first start" };
  let axis = "tokens";

  const element = (chart) => document.getElementById("chart-" + chart.name);
  const canChoose = (chart) => chart.xs.some((xs) => axis in xs);

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    return { text: value("--text"), line: value("--line"), panel: value("--panel") };
  };

  const themed = () => {
    const { text, line, panel } = colours();
    const found = { "font.color": text, "hoverlabel.bgcolor": panel, "hoverlabel.font.color": text };
    Object.assign(found, { "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": line, "modebar.activecolor": text });
    for (const name of ["xaxis", "yaxis"]) {
      found[name + ".gridcolor"] = line;
      found[name + ".linecolor"] = line;
      found[name + ".zerolinecolor"] = line;
    }
    return found;
  };

  const chosen = (chart) => chart.data.map((trace, index) => {
    const xs = chart.xs[index];
    if (!(axis in xs)) return trace.x;
    return axis === "seconds" ? xs.seconds.map((x) => (x === null ? null : x / page.time.divisor)) : xs[axis];
  });

  const layoutOf = (chart) => {
    const plain = {
      margin: { l: 64, r: 18, t: 24, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12 },
      hovermode: "closest",
      showlegend: chart.data.length > 1,
      legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom" },
      xaxis: { automargin: true, exponentformat: "B", title: { text: canChoose(chart) ? axisTitles[axis] : "", standoff: 8 } },
      yaxis: { automargin: true, exponentformat: "power" },
    };
    const own = chart.layout;
    return {
      ...plain, ...own,
      xaxis: { ...plain.xaxis, ...own.xaxis },
      yaxis: { ...plain.yaxis, ...own.yaxis },
    };
  };

  const recolour = () => {
    const change = themed();
    return Promise.all(page.charts.map((chart) => Plotly.relayout(element(chart), change)));
  };

  const drawn = Promise.all(page.charts.map((chart) => {
    const xs = chosen(chart);
    const data = chart.data.map((trace, index) => ({ ...trace, x: xs[index] }));
    return Plotly.newPlot(element(chart), data, layoutOf(chart), config);
  })).then(recolour).then(() => { document.documentElement.dataset.drawn = page.charts.length; });

  for (const button of document.querySelectorAll("input[name=axis]")) {
    button.addEventListener("change", () => {
      axis = button.value;
      for (const chart of page.charts.filter(canChoose)) {
        const change = { "xaxis.title.text": axisTitles[axis], "xaxis.autorange": true };
        Plotly.update(element(chart), { x: chosen(chart) }, change);
      }
    });
  }

  // On paper all charts are of one width, in one column; the browser asks before it lays that out.
  const paperWidth = 660;
  const relayout = (change) => { for (const chart of page.charts) Plotly.relayout(element(chart), change); };
  window.addEventListener("beforeprint", () => relayout({ autosize: false, width: paperWidth, height: 280 }));
  window.addEventListener("afterprint", () => relayout({ autosize: true, width: null, height: null }));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.then(recolour));
})();
