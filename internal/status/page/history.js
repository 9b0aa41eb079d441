// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The last hour, which the server remembers in steps of some seconds, and the choice between it and
// the last minutes, of which the page has a sample for each second. The choice is in the URL.

import { $ } from "./base.js"

const HOUR = 3600
const SPAN = 300 // seconds of which the page has samples

let steps = [] // of the last hour, oldest first
let unread = 0 // steps before the next one whose counts are in that one
let unused = false // samples have not been completed with the steps yet

// begin forgets everything: the server is about to send the whole hour.
export function begin() {
	steps = []
	unread = 0
}

// receive appends steps that the server has sent. They replace later ones if the clock has been set back.
export function receive(list) {
	unused ||= !steps.length
	let at = Date.parse(list.start) / 1000
	steps = steps.filter((step) => step.at <= at)
	list.tunnels.forEach((open, i) => {
		at += list.step_seconds
		if (open == null) {
			unread++
			steps.push({ at })
			return
		}
		const length = (unread + 1) * list.step_seconds
		unread = 0
		const step = { at, length, open, tracked: list.clients[i], up: list.bytes_up[i] / length, down: list.bytes_down[i] / length, requests: 0, counts: {} }
		for (const [name, counts] of Object.entries(list.requests)) {
			step.counts[name] = counts[i]
			step[name] = counts[i] / length
			step.requests += step[name]
		}
		step.dialled = list.dial_seconds[i]
		step.answered = list.first_byte_seconds[i]
		steps.push(step)
	})
	steps = steps.filter((step) => step.at > at - HOUR)
}

// complete adds the steps to the samples where those have gaps, once after the server has sent the
// whole hour. stats are the latest counters.
export function complete(samples, stats) {
	if (!unused) return samples
	unused = false
	const dial = stats.dial_seconds.counts.slice()
	const first = stats.first_byte_seconds.counts.slice()
	const added = []
	let start // of the first step
	const within = (step) => (s) => s.at > step.at - step.length && s.at <= step.at
	for (const step of steps.toReversed()) {
		if (step.length && !samples.some((s) => within(step)(s) && s.requests != null)) {
			samples = samples.filter((s) => !within(step)(s)) // what marks the gap
			const { dialled, answered, ...sample } = step
			added.push({ ...sample, dial: { ...stats.dial_seconds, counts: dial.slice() }, first: { ...stats.first_byte_seconds, counts: first.slice() } })
		}
		step.dialled?.forEach((n, i) => (dial[i] -= n))
		step.answered?.forEach((n, i) => (first[i] -= n))
		if (step.length) start = step.at - step.length
	}
	if (start && !samples.some((s) => s.at <= start)) added.push({ at: start, dial: { ...stats.dial_seconds, counts: dial }, first: { ...stats.first_byte_seconds, counts: first } })
	const from = Date.parse(stats.time) / 1000 - SPAN
	return [...samples, ...added.filter((s) => s.at > from)].sort((a, b) => a.at - b.at)
}

// isHour reports whether the charts cover the hour.
export const isHour = () => document.querySelector("input[name=span]:checked").value === "hour"

// span returns how many seconds the charts cover.
export const span = () => (isHour() ? HOUR : SPAN)

export const spanName = () => (isHour() ? "last hour" : "last five minutes")

// points returns what the charts show.
export const points = (samples) => (isHour() ? steps : samples)

// hourOf returns the histogram of the hour: dial or first.
export function hourOf(name, { buckets }) {
	const counts = Array(buckets.length + 1).fill(0)
	for (const step of steps) {
		for (const [i, n] of (step[{ dial: "dialled", first: "answered" }[name]] ?? []).entries()) counts[i] += n
	}
	return { buckets, counts, total: counts.reduce((a, b) => a + b, 0) }
}

// onSpan calls a function when the operator has chosen another span.
export function onSpan(call) {
	$("spans").addEventListener("change", () => {
		const url = new URL(location.href)
		if (isHour()) url.searchParams.set("span", "hour")
		else url.searchParams.delete("span")
		window.history.replaceState(null, "", url)
		call()
	})
}

const asked = new URLSearchParams(location.search).get("span") === "hour" ? "hour" : "minutes"
document.querySelector(`input[name=span][value=${asked}]`).checked = true
