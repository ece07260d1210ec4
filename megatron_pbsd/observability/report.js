// The values under the pointer: a cursor in the chart and a note beside it.
const tip = document.getElementById("tip");
for (const chart of document.querySelectorAll("svg.chart")) {
  const tips = JSON.parse(chart.dataset.tips);
  const [top, bottom] = chart.dataset.bounds.split(",");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", bottom);
  chart.addEventListener("mousemove", (event) => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width;
    const [at, ...lines] = tips.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    chart.append(cursor);
    tip.textContent = lines.join("\n");
    const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
    tip.style.left = left + "px";
    tip.style.top = Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 8) + "px";
    tip.style.opacity = 1;
  });
  chart.addEventListener("mouseleave", () => { cursor.remove(); tip.style.opacity = 0; });
}
