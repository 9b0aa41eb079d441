// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The samples of the last five minutes, one for each snapshot, and what is computed from them.

import { seconds } from "./base.js"
import * as hour from "./history.js"

export const SPAN = 300 // seconds of which there are samples

export let samples = [] // of the last SPAN seconds, oldest first
export let counters = null // of the latest snapshot, the base for rates
let clientCounters = new Map() // requests by row
let clientRates = new Map()

export const clientKey = (c) => `${c.zone} ${c.policy ?? ""} ${c.client}`

// rateOf returns how many requests per second a client sends.
export const rateOf = (c) => clientRates.get(clientKey(c)) ?? 0

// outcomes are the results of requests: their names, labels and colors.
export const outcomes = [
	["forwarded", "Forwarded", "forwarded"],
	["tunnels", "Tunnels", "tunnels"],
	["passed_on", "Passed on", "passed"],
	["rate_limited", "Rate limited", "limited"],
	["refused", "Refused", "refused"],
	["auth_required", "Asked to log in", "asked"],
	["failed", "Failed", "failed"],
]

// Keep the samples across a reload of the page.
const storage = "async_proxy"
try {
	const kept = JSON.parse(sessionStorage.getItem(storage))
	if (kept) ({ samples, counters } = kept)
} catch {
	// No storage, or its content is not ours.
}
addEventListener("pagehide", () => {
	try {
		sessionStorage.setItem(storage, JSON.stringify({ samples, counters }))
	} catch {
		// No storage: the charts start empty after a reload.
	}
})

// learn turns a snapshot into a sample with the rates since the previous one. There
// are no rates after a gap in the stream or a restart of the process.
export function learn(next) {
	const stats = next.stats
	const at = seconds(stats.time)
	const before = counters
	counters = { at, started: stats.started, requests: stats.requests, up: stats.bytes_up, down: stats.bytes_down }
	const sample = { at, open: stats.tunnels.open, tracked: stats.clients.tracked, dial: stats.dial_seconds, first: stats.first_byte_seconds }
	const elapsed = before ? at - before.at : 0
	const same = before?.started === stats.started
	if (before && same && elapsed > 0 && elapsed < 4) {
		const rate = (a, b) => Math.max(0, a - b) / elapsed
		sample.up = rate(counters.up, before.up)
		sample.down = rate(counters.down, before.down)
		for (const [name] of outcomes) sample[name] = rate(counters.requests[name] ?? 0, before.requests[name] ?? 0)
		sample.requests = outcomes.reduce((sum, [name]) => sum + sample[name], 0)
		sample.counts = Object.fromEntries(outcomes.map(([name]) => [name, sample[name] * elapsed]))
	} else if (before) {
		samples.push({ at: before.at + 0.5 }) // a gap
	}
	if (!same) for (const s of samples) s.dial = s.first = undefined // counts of the previous process
	samples = hour.complete(samples, stats)
	samples.push(sample)
	samples = samples.filter((s) => s.at > at - SPAN - 2 && s.at <= at)

	const rates = new Map()
	const requests = new Map()
	for (const client of next.clients.clients) {
		const key = clientKey(client)
		const before = clientCounters.get(key)
		requests.set(key, { at, n: client.requests })
		if (before && at > before.at) rates.set(key, Math.max(0, client.requests - before.n) / (at - before.at))
	}
	clientCounters = requests
	clientRates = rates
}

// over returns the samples of the last span seconds.
export function over(span) {
	const from = (counters?.at ?? 0) - span
	return samples.filter((s) => s.at > from)
}

export function mean(name, span) {
	const values = over(span).map((s) => s[name]).filter((v) => v != null)
	return values.length ? values.reduce((a, b) => a + b) / values.length : 0
}

// limitedShare returns how many requests of the last span seconds were rate limited,
// and their share of all.
export function limitedShare(span) {
	let limited = 0
	let all = 0
	for (const { counts } of over(span)) {
		if (!counts) continue
		limited += counts.rate_limited
		for (const [name] of outcomes) all += counts[name]
	}
	return { limited, share: all ? limited / all : 0 }
}

// histogram covers the last span seconds: the difference of two cumulative ones.
export function histogram(name, span) {
	const now = samples.at(-1)?.[name]
	if (!now) return { buckets: [], counts: [], total: 0 }
	const before = over(span + 1).find((s) => s[name])?.[name]
	const counts = now.counts.map((n, i) => Math.max(0, n - (before?.counts[i] ?? 0)))
	return { buckets: now.buckets, counts, total: counts.reduce((a, b) => a + b, 0) }
}

// quantile assumes that the values in a bucket are spread evenly over it.
export function quantile(h, q) {
	if (!h.total) return null
	let left = q * h.total
	for (let i = 0; i < h.buckets.length; i++) {
		const low = i ? h.buckets[i - 1] : 0
		if (left <= h.counts[i]) return low + ((h.buckets[i] - low) * left) / h.counts[i]
		left -= h.counts[i]
	}
	return h.buckets.at(-1)
}
