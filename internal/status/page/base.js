// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// What all parts of the status page need: formatting of numbers, and elements.

export const $ = (id) => document.getElementById(id)

// ---- Number formatting

const integers = new Intl.NumberFormat("en")
export const count = (n) => integers.format(Math.round(n))

// short formats a number with about three digits: 0, 0.4, 7.5, 12, 1.2 k.
export function short(n) {
	for (const [unit, size] of [[" G", 1e9], [" M", 1e6], [" k", 1e3]]) {
		if (Math.abs(n) >= size * 0.9995) return digits(n / size) + unit
	}
	return digits(n)
}

export function digits(n) {
	if (n === 0) return "0"
	if (Math.abs(n) < 9.95) return n.toFixed(1).replace(/\.0$/, "")
	return n.toFixed(0)
}

// bytes returns a number and its unit.
export function bytes(n) {
	let unit = "B"
	for (const next of ["kB", "MB", "GB", "TB", "PB"]) {
		if (n < 999.5) break
		n /= 1000
		unit = next
	}
	return [unit === "B" ? n.toFixed(0) : n < 9.95 ? n.toFixed(1) : n.toFixed(0), unit]
}
export const bytesText = (n) => bytes(n).join(" ")

export function percent(share) {
	if (!(share > 0)) return "0"
	return share < 0.1 ? (100 * share).toFixed(1) : (100 * share).toFixed(0)
}

// span formats seconds in at most two units: 4 s, 3 min 12 s, 2 h 5 min, 3 d 4 h.
export function span(seconds) {
	const s = Math.max(0, Math.floor(seconds))
	if (s < 60) return `${s} s`
	const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]
	const first = parts.findIndex(([, size]) => s >= size)
	const [unit, size] = parts[first]
	const [unit2, size2] = parts[first + 1]
	const rest = Math.floor((s % size) / size2)
	return `${Math.floor(s / size)} ${unit}` + (rest ? ` ${rest} ${unit2}` : "")
}

export function latency(seconds) {
	if (seconds == null) return ["–", ""]
	const ms = seconds * 1000
	if (ms >= 1000) return [digits(seconds), "s"]
	return [digits(ms), "ms"]
}

// Go's timestamps have nanoseconds, which Date accepts.
export const seconds = (time) => Date.parse(time) / 1000
export const clock = (t) => new Date(t * 1000).toLocaleTimeString("en-GB")

// ---- Elements

export function make(tag, attributes = {}, ...children) {
	const e = document.createElement(tag)
	for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value)
	e.append(...children)
	return e
}

export function makeSVG(tag, attributes = {}) {
	const e = document.createElementNS("http://www.w3.org/2000/svg", tag)
	for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value)
	return e
}

export function setText(e, text) {
	if (e.textContent !== text) e.textContent = text
}

export function setAttribute(e, name, value) {
	if (value == null) e.removeAttribute(name)
	else if (e.getAttribute(name) !== String(value)) e.setAttribute(name, value)
}

let noteTimer
export function note(text) {
	$("note").textContent = text
	$("note").classList.add("shown")
	clearTimeout(noteTimer)
	noteTimer = setTimeout(() => $("note").classList.remove("shown"), 4000)
}
