"use strict";
// Filters, copying of commands, and numbers that unfold when a cell leads to them. The page is whole without this.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const form = document.getElementById("filters");

  function filter() {
    const chosen = (name) => new Set(all(`input[name=${name}]:checked`, form).map((input) => input.value));
    const schemes = chosen("scheme");
    const mergers = chosen("merger");
    const out = (some, value) => some.size > 0 && value !== undefined && !some.has(value);
    for (const part of all("[data-scheme], [data-merger]")) {
      part.hidden = out(schemes, part.dataset.scheme) || out(mergers, part.dataset.merger);
    }
    const cells = all("details.cell");
    const shown = cells.filter((cell) => !cell.hidden).length;
    form.querySelector("output").textContent = `${shown} of ${cells.length} cells shown`;
  }

  function unfold(fragment) {
    const target = fragment.length > 1 && document.getElementById(fragment.slice(1));
    const folded = target && target.closest("details");
    if (!folded) return;
    if (folded.hidden) {
      form.reset();
      filter();
    }
    folded.open = true;
    target.scrollIntoView({ block: "nearest" });
    target.focus({ preventScroll: true });
  }

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    let done = false;
    try {
      await navigator.clipboard.writeText(code.textContent);
      done = true;
    } catch {
      // No permission, or a page that was not served safely: the command stays selected.
    }
    const label = button.firstChild;
    label.data = done ? "Copied" : "Selected";
    setTimeout(() => { label.data = "Copy"; }, 2000);
  }

  if (form) {
    form.hidden = false;
    form.addEventListener("change", filter);
    form.addEventListener("reset", () => setTimeout(filter));
  }
  for (const button of all("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (link) setTimeout(() => unfold(link.hash)); // after the browser has gone there
  });
  addEventListener("hashchange", () => unfold(location.hash));
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])");
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
  });
  unfold(location.hash);
})();
