// What is wrong with a page, as a list of sentences.
(() => {
  const faults = [];
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) {
    const wide = [...document.querySelectorAll("body *")].filter(
      (it) => it.getBoundingClientRect().right > root.clientWidth + 1 && !it.closest(".scroll"),
    );
    faults.push(`the page scrolls sideways: ${wide.slice(0, 3).map((it) => it.outerHTML.slice(0, 80))}`);
  }

  // WCAG's contrast of two colours.
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = rgb(colour)
      .slice(0, 3)
      .map((it) => it / 255)
      .map((it) => (it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const paper = (it) => {
    for (; it; it = it.parentElement) {
      const colour = getComputedStyle(it).backgroundColor;
      if (rgb(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const shown = (it) => it.getClientRects().length > 0 && !it.closest(".unseen");
  const own = (it) => [...it.childNodes].some((node) => node.nodeType === 3 && node.data.trim());

  for (const it of document.querySelectorAll("body *:not(script, title, desc)")) {
    if (!own(it) || !shown(it)) continue;
    const drawn = it instanceof SVGElement;
    const colour = getComputedStyle(it)[drawn ? "fill" : "color"];
    let behind = paper(it);
    if (it.matches(".inside")) {
      const phase = [...it.classList].find((name) => name !== "inside" && name !== "wide");
      const part = it.parentElement.querySelector(`rect.${phase}`);
      behind = getComputedStyle(part).fill;
      const [text, box] = [it, part].map((it) => it.getBoundingClientRect());
      if (text.left < box.left || text.right > box.right) faults.push(`"${it.textContent}" is wider than its part`);
    }
    const ratio = contrast(colour, behind);
    if (ratio < 4.5) faults.push(`"${it.textContent.slice(0, 30)}" has a contrast of ${ratio.toFixed(2)}`);
  }
  // What is drawn in a phase's colour is told from the page.
  for (const it of document.querySelectorAll(".swatch")) {
    it.style.color = "var(--phase)";
    const ratio = contrast(getComputedStyle(it).color, paper(it.parentElement));
    if (!it.matches(".kernel, .init") && ratio < 3) faults.push(`${it.className} has a contrast of ${ratio.toFixed(2)}`);
  }

  for (const it of document.querySelectorAll("svg[role=img]")) {
    const named = (it.getAttribute("aria-labelledby") ?? "").split(" ");
    if (named.length < 2 || named.some((id) => !document.getElementById(id)?.textContent)) {
      faults.push(`a drawing has no name or description: ${it.outerHTML.slice(0, 80)}`);
    }
  }
  for (const it of document.querySelectorAll("table")) {
    if (!it.caption?.textContent) faults.push("a table has no caption");
    if (it.querySelector("th:not([scope])")) faults.push("a head has no scope");
    const widths = new Set([...it.rows].map((row) => row.cells.length));
    if (widths.size !== 1) faults.push(`rows of different lengths: ${it.caption?.textContent}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((it) => it.id);
  for (const id of new Set(ids.filter((it, at) => ids.indexOf(it) !== at))) faults.push(`#${id} twice`);
  for (const it of document.querySelectorAll("nav a")) {
    if (!document.querySelector(it.getAttribute("href"))) faults.push(`${it.href} leads nowhere`);
  }
  return faults;
})();
