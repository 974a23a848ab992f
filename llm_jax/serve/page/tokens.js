// The text as tokens: what stands in each, and how it looks. Text is set as text, never as HTML.

import { percent, word } from './words.js';

const BITS = 10; // the shade is full where a token had a chance of one in a thousand

export const list = []; // {id, piece, bytes, log, top, given, node}
const box = document.getElementById('tokens');
let decoder = new TextDecoder();

export const probability = token => token.log === undefined ? null : Math.exp(token.log);

export function append(token) {
  token.node = document.createElement('span');
  token.node.className = 'token';
  token.node.setAttribute('role', 'button');
  token.node.tabIndex = list.length ? -1 : 0;
  list.push(token);
  fill(token);
  paint(token);
  box.append(token.node);
}

// A piece as it is shown beside others: with spaces that can be seen.
export const visible = piece => piece.replaceAll(' ', '␣');

// Leaves the first `count` tokens.
export function truncate(count) {
  for (const token of list.splice(count)) token.node.remove();
  decoder = new TextDecoder();
  for (const token of list) fill(token);
  if (list.length && !list.some(token => token.node.tabIndex === 0)) list[0].node.tabIndex = 0;
}

export function paint(token) {
  const chance = probability(token);
  const shade = chance === null ? 0 : Math.min(1, -Math.log2(Math.max(chance, 1e-9)) / BITS);
  token.node.style.setProperty('--shade', shade.toFixed(3));
  token.node.classList.toggle('given', Boolean(token.given));
  token.node.setAttribute('aria-label', `${token.piece}, ${chance === null ? word('no_chance') : percent(chance)}`);
}

// A character's bytes may lie in several tokens: it shows in the last of them.
function fill(token) {
  const bytes = Uint8Array.from(token.bytes, character => character.charCodeAt(0));
  const text = decoder.decode(bytes, { stream: true });
  token.text = text;
  const node = token.node;
  node.replaceChildren();
  node.classList.toggle('special', !bytes.length);
  node.classList.toggle('part', bytes.length > 0 && !text);
  if (!bytes.length) {
    node.textContent = token.piece;
    return;
  }
  text.split('\n').forEach((line, index) => {
    if (index) {
      node.append(Object.assign(document.createElement('i'), { className: 'newline' }), '\n');
    }
    if (line) node.append(line);
  });
}

export const indexOf = node => {
  const token = node instanceof Element ? node.closest('.token') : null;
  return token ? list.findIndex(entry => entry.node === token) : -1;
};

// Where the pointer's card belongs: the first line of the token that has a width.
export function place(token) {
  const rectangles = [...token.node.getClientRects()];
  return rectangles.find(box => box.width > 1) ?? rectangles[0] ?? token.node.getBoundingClientRect();
}

// The token of the line above (-1) or below (1) that is nearest to this one.
export function across(index, direction) {
  const from = place(list[index]);
  const middle = from.left + from.width / 2;
  let best = index, bestScore = Infinity;
  list.forEach((token, other) => {
    const to = place(token);
    const lines = (to.top - from.top) * direction;
    if (lines < from.height / 2) return;
    const score = lines * 1000 + Math.abs(to.left + to.width / 2 - middle);
    if (score < bestScore) [best, bestScore] = [other, score];
  });
  return best;
}

export function focus(index, options) {
  for (const token of list) token.node.tabIndex = -1;
  list[index].node.tabIndex = 0;
  list[index].node.focus(options);
}

export function repaint() {
  for (const token of list) paint(token);
}

// Attention in place of chances: weights of 0 to 1 for the first tokens, or null for chances.
export function look(weights, from) {
  const most = Math.max(...(weights ?? []), 0.001);
  document.getElementById('text').classList.toggle('looking', weights !== null);
  const [low, high] = document.querySelectorAll('#scale span');
  low.textContent = weights ? '0%' : '100%';
  high.textContent = weights ? (weights.length ? percent(most) : '') : '0.1%';
  list.forEach((token, index) => {
    const weight = weights && index < weights.length ? weights[index] / most : 0;
    token.node.style.setProperty('--look', Math.sqrt(weight).toFixed(3));
    token.node.classList.toggle('from', index === from);
  });
}
