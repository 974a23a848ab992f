// The card beside a token: what could stand in its place, each a button.

import { list, place, probability, visible } from './tokens.js';
import { percent, word } from './words.js';

const card = document.getElementById('card');
let shown = -1;
export const shownFor = () => shown;
export const contains = node => card.contains(node);

export function show(index, pick, close) {
  const token = list[index];
  shown = index;
  card.replaceChildren();
  const title = part(card, 'div', 'title');
  part(title, 'span', 'piece', visible(token.piece));
  const chance = probability(token);
  part(title, 'span', 'soft', chance === null ? word('no_chance') : percent(chance));
  const end = part(title, 'button', 'close', '×');
  end.type = 'button';
  end.setAttribute('aria-label', word('close'));
  end.addEventListener('click', close);
  fill(card, index, pick);
  card.hidden = false;
  move();
}

// Adds a button for each of a token's alternatives.
export function fill(parent, index, pick) {
  const token = list[index];
  for (const [id, piece, log] of alternatives(token)) {
    const row = part(parent, 'button', id === token.id ? 'alternative mine' : 'alternative');
    row.type = 'button';
    part(row, 'span', 'piece', visible(piece));
    const bar = part(part(row, 'span', 'track'), 'i');
    bar.style.width = `${100 * Math.exp(log)}%`;
    part(row, 'span', 'chance', percent(Math.exp(log)));
    row.addEventListener('click', () => pick(index, { id, piece, log }));
  }
}

// The best, and the token itself where it is none of them.
function alternatives(token) {
  const top = token.top ?? [];
  if (!top.length || top.some(([id]) => id === token.id)) return top;
  return [...top.slice(0, -1), [token.id, token.piece, token.log]];
}

// Below its token, or above where there is more room; a style sheet puts it at the bottom of a phone.
export function move() {
  if (card.hidden || shown < 0 || !list[shown]) return;
  const box = place(list[shown]);
  const { offsetWidth: width, offsetHeight: height } = card;
  const below = box.bottom + height + 12 < innerHeight || box.top < height + 12;
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8));
  card.style.left = `${left + scrollX}px`;
  card.style.top = `${(below ? box.bottom + 6 : box.top - height - 6) + scrollY}px`;
}

// On a phone the card is a sheet at the bottom, which must not hide what it is about.
export function uncover(index) {
  const overlap = place(list[index]).bottom + 24 - card.getBoundingClientRect().top;
  if (getComputedStyle(card).position === 'fixed' && overlap > 0) scrollBy({ top: overlap });
}

export function hide() {
  card.hidden = true;
  shown = -1;
}

export function enter(parent) {
  (parent.querySelector('.alternative.mine') ?? parent.querySelector('.alternative'))?.focus();
}

// Up and down among alternatives.
export function walk(event) {
  const rows = [...event.currentTarget.querySelectorAll('.alternative')];
  const at = rows.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (to === undefined || !rows.length) return;
  event.preventDefault();
  rows[Math.max(0, Math.min(to, rows.length - 1))].focus();
}

function part(parent, tag, name, text) {
  const node = parent.appendChild(document.createElement(tag));
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}
