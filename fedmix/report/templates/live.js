"use strict";
// Asks once a second for what has changed, and keeps the reader's place: the focus and the sideways scroll of a table.
const PAUSE_MS = 1000;
const now = document.getElementById("now");
const lost = document.getElementById("lost");
let tag = "";

function labelled(label) {
  return [...now.querySelectorAll("[aria-label]")].find((one) => one.getAttribute("aria-label") === label);
}

function put(html) {
  const focused = document.activeElement.getAttribute("aria-label");
  const scrolled = [...now.querySelectorAll(".scroll")].map((one) => [one.getAttribute("aria-label"), one.scrollLeft]);
  now.innerHTML = html; // escaped by the server; the page's content security policy runs no script in it
  for (const [label, left] of scrolled) {
    const found = labelled(label);
    if (found) found.scrollLeft = left;
  }
  if (focused && labelled(focused)) labelled(focused).focus({ preventScroll: true });
}

async function look() {
  try {
    const answer = await fetch("now", { headers: { "If-None-Match": tag }, cache: "no-store" });
    if (answer.status === 200) {
      put(await answer.text());
      tag = answer.headers.get("ETag");
    }
    lost.textContent = "";
  } catch {
    lost.textContent = "fedmix report --serve does not answer; what is shown may be old.";
  }
  setTimeout(look, PAUSE_MS);
}

look();
