// What the pages do: all code of a page shown or folded, and claims chosen by their verdict.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  // Names that the theme leaves out, for screen readers.
  document.querySelector(".sidebar-drawer")?.setAttribute("aria-label", "pages");
  document.querySelector(".toc-drawer")?.setAttribute("aria-label", "on this page");
  document.querySelectorAll(".caption[role=heading]").forEach((caption) => {
    caption.setAttribute("aria-level", "2");
  });
  document.querySelectorAll("details.hide > summary").forEach((summary) => {
    summary.removeAttribute("aria-label");  // its text says what it does
  });
  // What scrolls sideways can be scrolled by keyboard.
  document.querySelectorAll("pre, .output, .table-wrapper, .equation").forEach((part) => {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
  });

  const folded = [...document.querySelectorAll(".cell details.hide")];
  const heading = document.querySelector("article h1");
  if (folded.length && heading) {
    const button = document.createElement("button");
    button.className = "show-code";
    const label = () => {
      const open = folded.every((part) => part.open);
      button.textContent = open ? "Fold long code" : "Show all code";
    };
    button.addEventListener("click", () => {
      const open = !folded.every((part) => part.open);
      folded.forEach((part) => { part.open = open; });
      label();
    });
    folded.forEach((part) => part.addEventListener("toggle", label));
    label();
    heading.after(button);
  }
  // A cell that a link leads to is unfolded.
  const target = location.hash ? document.getElementById(location.hash.slice(1)) : null;
  if (target?.classList.contains("cell")) {
    target.querySelectorAll("details.hide").forEach((part) => { part.open = true; });
    target.scrollIntoView();
  }

  const buttons = [...document.querySelectorAll(".filter button")];
  buttons.forEach((button) => button.addEventListener("click", () => {
    const wanted = button.dataset.show;
    buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
    for (const claim of document.querySelectorAll(".claim")) {
      claim.hidden = Boolean(wanted) && claim.dataset.verdict !== wanted;
    }
  }));
});
