// Draws the charts, and shows or hides a run in all of them.
const charts = JSON.parse(document.getElementById("charts").textContent);
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const divs = charts.map((chart, i) => {
  const div = document.getElementById(`chart-${i}`);
  Plotly.newPlot(div, chart.data, chart.layout, config);
  return div;
});
for (const box of document.querySelectorAll("input[data-run]")) {
  box.addEventListener("change", () => {
    const run = Number(box.dataset.run);
    for (const div of divs) {
      const traces = div.data.flatMap((trace, k) => (trace.meta === run ? [k] : []));
      if (traces.length) Plotly.restyle(div, { visible: box.checked }, traces);
    }
  });
}
