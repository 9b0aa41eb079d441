// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The live status page of async_proxy. It receives a snapshot every second as a
// server-sent event and keeps five minutes of samples for the charts. history.js has the hour.

/* global uPlot */

import { $, count, short, digits, bytes, bytesText, percent, span, latency, seconds, clock, make, makeSVG, setText, setAttribute, note } from "./base.js"
import { Table, text, twoLines, showLines, actionCell, policyNote } from "./table.js"
import { refusalsTable, refusalsQuery, isAbout } from "./refusals.js"
import { targetsTable } from "./targets.js"
import * as hour from "./history.js"
import { showWarnings, isWrong } from "./warnings.js"

const SPAN = 300 // seconds of which there are samples
const RECENT = 60 // seconds that the tiles cover

// ---- State

let snapshot = null // the latest one
let canAct = false
let masked = false
let paused = false
let samples = [] // of the last SPAN seconds, oldest first
let counters = null // of the latest snapshot, the base for rates
let clientCounters = new Map() // requests by row
let clientRates = new Map()

const outcomes = [
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
function learn(next) {
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
function over(span) {
	const from = (counters?.at ?? 0) - span
	return samples.filter((s) => s.at > from)
}

function mean(name, span) {
	const values = over(span).map((s) => s[name]).filter((v) => v != null)
	return values.length ? values.reduce((a, b) => a + b) / values.length : 0
}

// limitedShare returns how many requests of the last span seconds were rate limited,
// and their share of all.
function limitedShare(span) {
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
function histogram(name, span) {
	const now = samples.at(-1)?.[name]
	if (!now) return { buckets: [], counts: [], total: 0 }
	const before = over(span + 1).find((s) => s[name])?.[name]
	const counts = now.counts.map((n, i) => Math.max(0, n - (before?.counts[i] ?? 0)))
	return { buckets: now.buckets, counts, total: counts.reduce((a, b) => a + b, 0) }
}

// quantile assumes that the values in a bucket are spread evenly over it.
function quantile(h, q) {
	if (!h.total) return null
	let left = q * h.total
	for (let i = 0; i < h.buckets.length; i++) {
		const low = i ? h.buckets[i - 1] : 0
		if (left <= h.counts[i]) return low + ((h.buckets[i] - low) * left) / h.counts[i]
		left -= h.counts[i]
	}
	return h.buckets.at(-1)
}

// ---- Tiles

class Tile {
	constructor(label, lines) {
		this.value = make("dd", { class: "value" })
		this.more = make("dd", { class: "more" })
		this.svg = makeSVG("svg", { viewBox: `0 0 ${RECENT} 30`, preserveAspectRatio: "none", "aria-hidden": "true" })
		this.area = makeSVG("path", { class: "spark-area" })
		this.lines = lines.map((_, i) => makeSVG("path", { class: i ? "spark-line other" : "spark-line" }))
		this.names = lines
		this.svg.append(this.area, ...this.lines)
		this.root = make("div", { class: "tile" }, make("dt", {}, label), this.value, this.more)
		this.root.append(this.svg)
		$("tiles").append(this.root)
	}

	show(number, unit, more, state = "") {
		if (this.text !== number + unit) {
			this.text = number + unit
			this.value.replaceChildren(number, make("small", {}, unit))
		}
		setText(this.more, more)
		setAttribute(this.root, "class", `tile ${state}`)
		this.spark()
	}

	spark() {
		const recent = over(RECENT + 1)
		const end = counters.at
		const value = (s, name) => (typeof name === "function" ? name(s) : s[name])
		let most = 0
		for (const s of recent) for (const name of this.names) most = Math.max(most, value(s, name) ?? 0)
		this.names.forEach((name, i) => {
			let path = ""
			let first = null
			let last = null
			let pen = "M"
			for (const s of recent) {
				const v = value(s, name)
				if (v == null) {
					pen = "M"
					continue
				}
				const x = (RECENT - (end - s.at)).toFixed(2)
				path += `${pen}${x} ${(28 - (most ? (24 * v) / most : 0)).toFixed(2)}`
				pen = "L"
				first ??= x
				last = x
			}
			this.lines[i].setAttribute("d", path)
			if (i === 0) this.area.setAttribute("d", first == null ? "" : `${path.replaceAll("M", "L").replace("L", "M")}L${last} 30L${first} 30Z`)
		})
	}
}

const tiles = {
	requests: new Tile("Requests", ["requests"]),
	limited: new Tile("Rate limited", ["rate_limited"]),
	tunnels: new Tile("Open tunnels", ["open"]),
	bytes: new Tile("Throughput", ["down", "up"]),
	dial: new Tile("Connecting", [(s) => s.p50]),
	clients: new Tile("Clients tracked", ["tracked"]),
}

function showTiles(stats) {
	const rate = mean("requests", 5)
	const total = Object.values(stats.requests).reduce((a, b) => a + b, 0)
	tiles.requests.show(short(rate), "/s", `${count(total)} since start`)

	const { limited, share } = limitedShare(RECENT)
	tiles.limited.show(percent(share), "%", `${count(limited)} in the last minute`, share >= 0.2 ? "bad" : share > 0 ? "warn" : "")

	const { open, limit } = stats.tunnels
	tiles.tunnels.show(count(open), "", limit ? `of ${count(limit)} · ${percent(open / limit)} %` : "no limit", isWrong("tunnels_near_limit") ? "bad" : "")

	const down = bytes(mean("down", 5))
	const up = bytes(mean("up", 5))
	tiles.bytes.show(down[0], `${down[1]}/s down`, `${up.join(" ")}/s up`)

	const h = histogram("dial", RECENT)
	const p99 = latency(quantile(h, 0.99))
	const failed = stats.dials.failed
	tiles.dial.show(...latency(quantile(h, 0.5)), h.total ? `p99 ${p99.join(" ")} · ${count(failed)} failed` : `none in the last minute`)

	const { tracked, limit: most, evicted } = stats.clients
	tiles.clients.show(tracked < 100000 ? count(tracked) : short(tracked), "",
		`of ${short(most)}` + (evicted ? ` · ${short(evicted)} forgotten early` : ""), tracked >= most * 0.9 ? "bad" : isWrong("clients_forgotten") ? "warn" : "")
}

// ---- Charts

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()

// rounds are the possible steps of a scale: 1, 2, 5, 10, 20, ...
const rounds = Array.from({ length: 45 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3))

// Chart draws lines or a stack of values over the last five minutes or the last hour.
class Chart {
	constructor(title, unit, series, { stacked = false, write, least }) {
		this.series = series
		this.stacked = stacked
		this.write = write
		this.least = least // smallest upper end of the scale
		this.title = title
		this.plotElement = make("div", { class: "plot", role: "img" })
		this.values = series.map(() => make("b", {}, "–"))
		const legend = make("ul", { class: "legend" })
		series.forEach(([, label, name], i) => {
			const key = make("span", { class: "key" })
			key.style.setProperty("--key", `var(--${name})`)
			legend.append(make("li", {}, key, `${label} `, this.values[i]))
		})
		this.when = make("small", {}, unit)
		this.unit = unit
		$("charts").append(make("div", { class: "card chart" },
			make("div", { class: "chart-head" }, make("h3", {}, title, " ", this.when), legend), this.plotElement))
		this.build()
		new ResizeObserver(() => this.resize()).observe(this.plotElement)
	}

	build() {
		this.plot?.destroy()
		setAttribute(this.plotElement, "aria-label", `Chart: ${this.title}, ${hour.spanName()}`)
		const soft = color("soft")
		const grid = { stroke: color("line"), width: 1 }
		const font = `11px ${getComputedStyle(document.body).fontFamily}`
		this.plot = new uPlot({
			width: this.plotElement.clientWidth || 400,
			height: this.plotElement.clientHeight || 176,
			padding: [8, 4, 0, 0],
			legend: { show: false },
			cursor: { sync: { key: "async_proxy" }, drag: { setScale: false }, y: false, points: { show: !this.stacked, size: 5 } },
			scales: {
				x: { range: () => [(counters?.at ?? SPAN) - hour.span(), counters?.at ?? SPAN] },
				y: { range: (_, __, most) => [0, Math.max(most * 1.08, this.least)] },
			},
			axes: [
				{ stroke: soft, grid: { show: false }, ticks: { show: false }, font, size: 24, incrs: [hour.isHour() ? 600 : 60], values: (_, splits) => splits.map((t) => clock(t).slice(0, 5)) },
				{ stroke: soft, grid, ticks: { show: false }, font, size: 56, space: 34, incrs: rounds, values: (_, splits) => splits.map((v) => this.write(v)) },
			],
			series: [{}, ...this.series.map(([, , name]) => ({
				stroke: color(name),
				fill: this.stacked ? color(name) + "d9" : this.series.length === 1 ? color(name) + "22" : undefined,
				width: this.stacked ? 0 : 1.75,
				paths: hour.isHour() ? uPlot.paths.stepped({ align: -1 }) : undefined, // a step is as wide as a pixel
				points: { show: false },
			}))],
			bands: this.stacked ? this.series.slice(1).map((_, i) => ({ series: [i + 2, i + 1] })) : undefined,
			hooks: { setCursor: [() => this.legend()] },
		}, this.data(), this.plotElement)
		this.legend()
	}

	data() {
		const points = hour.points(samples)
		const data = [points.map((s) => s.at)]
		let below = points.map(() => 0)
		for (const [name] of this.series) {
			const values = points.map((s) => s[name] ?? null)
			if (this.stacked) below = values.map((v, i) => (v == null ? null : below[i] + v))
			data.push(this.stacked ? below : values)
		}
		return data
	}

	update() {
		this.plot.setData(this.data())
		this.legend()
	}

	// legend shows the values at the cursor, or the latest.
	legend() {
		if (!this.plot) return
		const points = hour.points(samples)
		const at = points[this.plot.cursor.idx ?? -1]
		const sample = at ?? points.at(-1)
		setText(this.when, at ? clock(at.at) : this.unit)
		this.series.forEach(([name], i) => setText(this.values[i], sample?.[name] == null ? "–" : this.write(sample[name])))
	}

	resize() {
		this.plot.setSize({ width: this.plotElement.clientWidth, height: this.plotElement.clientHeight })
	}
}

// LatencyChart draws a histogram of the last five minutes or the last hour.
class LatencyChart {
	constructor() {
		this.series = [["dial", "Connecting", "tunnels"], ["first", "First byte", "up"]]
		this.plotElement = make("div", { class: "plot", role: "img" })
		this.when = make("small")
		this.values = this.series.map(() => make("b", {}, "–"))
		const legend = make("ul", { class: "legend" })
		this.series.forEach(([, label, name], i) => {
			const key = make("span", { class: "key" })
			key.style.setProperty("--key", `var(--${name})`)
			legend.append(make("li", {}, key, `${label} `, this.values[i]))
		})
		$("charts").append(make("div", { class: "card chart" },
			make("div", { class: "chart-head" }, make("h3", {}, "Latency ", this.when), legend), this.plotElement))
		new ResizeObserver(() => this.update()).observe(this.plotElement)
	}

	update() {
		const width = this.plotElement.clientWidth
		const height = this.plotElement.clientHeight
		setText(this.when, hour.spanName())
		const histograms = this.series.map(([name]) => (hour.isHour() && snapshot ? hour.hourOf(name, samples.at(-1)[name]) : histogram(name, SPAN)))
		const words = this.series.map(([, label], i) => {
			const h = histograms[i]
			const text = h.total ? `p50 ${latency(quantile(h, 0.5)).join(" ")} · p99 ${latency(quantile(h, 0.99)).join(" ")}` : "–"
			setText(this.values[i], text)
			return `${label}: ${h.total ? text : "nothing yet"}`
		})
		setAttribute(this.plotElement, "aria-label", `Histogram of latencies, ${hour.spanName()}. ${words.join(". ")}`)
		const svg = makeSVG("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" })
		const bounds = histograms[0].buckets
		const left = 44
		const bottom = 22
		const inner = height - bottom - 8
		svg.append(makeSVG("line", { x1: left, x2: width, y1: 8 + inner, y2: 8 + inner }))
		const total = Math.max(...histograms.map((h) => h.total))
		if (width > left && bounds.length && total) {
			const most = Math.ceil(10 * Math.max(...histograms.flatMap((h) => h.counts.map((n) => (h.total ? n / h.total : 0))))) / 10
			const step = (width - left) / (bounds.length + 1)
			for (const at of [0, 0.5, 1]) {
				const y = 8 + inner * (1 - at)
				if (at) svg.append(makeSVG("line", { x1: left, x2: width, y1: y, y2: y }))
				const label = makeSVG("text", { x: left - 8, y: y + 4, "text-anchor": "end" })
				label.textContent = `${percent(most * at)} %`
				svg.append(label)
			}
			const bar = Math.max(1, Math.min(14, step * 0.36))
			histograms.forEach((h, k) => h.counts.forEach((n, i) => {
				if (!n) return
				const size = Math.max(1, (inner * n) / h.total / most)
				const rect = makeSVG("rect", { x: left + step * (i + 0.5) + (k ? 1 : -bar - 1), width: bar, y: 8 + inner - size, height: size, rx: 1.5 })
				rect.style.fill = `var(--${this.series[k][2]})`
				const title = makeSVG("title")
				const [low, high] = [bounds[i - 1], bounds[i]]
				title.textContent = `${this.series[k][1]}: ${count(n)} of ${count(h.total)} ` +
					(high == null ? `over ${latency(low).join(" ")}` : `up to ${latency(high).join(" ")}`)
				rect.append(title)
				svg.append(rect)
			}))
			const every = Math.ceil(46 / step)
			bounds.forEach((bound, i) => {
				if (i % every) return
				const label = makeSVG("text", { x: left + step * (i + 1), y: height - 5, "text-anchor": "middle" })
				label.textContent = latency(bound).join(" ")
				svg.append(label)
			})
		} else {
			const label = makeSVG("text", { x: (width + left) / 2, y: height / 2, "text-anchor": "middle" })
			label.textContent = `No connections in the ${hour.spanName()}`
			svg.append(label)
		}
		this.plotElement.replaceChildren(svg)
	}
}

const bytesRate = (n) => `${bytesText(n)}/s`
const charts = [
	new Chart("Requests", "per second, by outcome", outcomes, { stacked: true, write: short, least: 5 }),
	new Chart("Throughput", "all that goes through", [["down", "Down", "down"], ["up", "Up", "up"]], { write: bytesRate, least: 1000 }),
	new Chart("Tunnels", "open", [["open", "Open", "tunnels"]], { write: count, least: 5 }),
	new LatencyChart(),
]
hour.onSpan(() => charts.forEach((chart) => (chart.build ? chart.build() : chart.update())))
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((c) => c.build?.()))

// ---- Tables

const clientKey = (c) => `${c.zone} ${c.policy ?? ""} ${c.client}`
const isBlocked = (c) => c.blocked_until && seconds(c.blocked_until) > counters.at
const isLimited = (c) => c.tokens < 1
const age = (time) => (time ? counters.at - seconds(time) : Infinity)
const ago = (time) => (!time ? "never" : age(time) < 1.5 ? "now" : `${span(age(time))} ago`)

// tokens are rounded down: a fraction of a token does not admit a request.
const tokens = (n) => (n < 10 ? digits(Math.floor(n * 10) / 10) : count(Math.floor(n)))

// With several zones or policies, the same client may have several rows.
let manyZones = false
let policies = [] // the names of all; empty: there are only the directive's own options
const inZone = (c) => (manyZones ? ` in zone ${c.zone}` : "") + (c.policy ? ` in policy ${c.policy}` : "")
// policyColumn returns the column for the policy, which is hidden while there are none.
const policyColumn = () => ({
	name: "policy", label: "Policy", value: (row) => row.policy ?? "", first: 1, class: "soft mid",
	show(cell, row) {
		cell.hidden = !policies.length
		setText(cell, row.policy ?? "–")
	},
})

// ownPolicy stands for the directive's own options in requests to the server.
const ownPolicy = "default"
const isOfPolicy = (row) => !$("policy").value || (row.policy ?? ownPolicy) === $("policy").value

// listPolicies offers the policies of the snapshot to choose from.
function listPolicies() {
	const rows = [...snapshot.clients.clients, ...snapshot.tunnels.tunnels, ...snapshot.refusals.refusals, ...snapshot.settings.flatMap((s) => s.policies ?? [])]
	const names = [...new Set(rows.map((row) => row.policy).filter(Boolean))].sort()
	if (names.join() === policies.join()) return
	policies = names
	const chosen = $("policy").value
	const option = (value, label) => make("option", { value }, label)
	$("policy").replaceChildren(option("", "All policies"), option(ownPolicy, "Without a policy"), ...names.map((name) => option(name, name)))
	$("policy").value = [ownPolicy, ...names].includes(chosen) && names.length ? chosen : ""
	$("policies").hidden = !names.length
}

function named(cell, kept) {
	kept.name = make("span")
	kept.zone = make("span", { class: "zone" })
	kept.policy = make("span", { class: "sub" })
	kept.badge = make("span")
	cell.append(kept.name, kept.zone, kept.policy, kept.badge)
}

const clients = new Table("clients", {
	key: clientKey,
	sort: "last_seen",
	empty: "No clients yet.",
	classes: (c) => (isBlocked(c) ? "blocked" : isLimited(c) ? "limited" : ""),
	columns: [
		{
			name: "client", label: "Client", value: (c) => c.client, first: 1, class: "wrap", make: named,
			show(_, c, kept) {
				setText(kept.name, c.client)
				setText(kept.zone, manyZones ? ` ${c.zone}` : "")
				setText(kept.policy, c.policy ?? "")
				const state = isBlocked(c) ? "blocked" : isLimited(c) ? "limited" : ""
				setText(kept.badge, state === "blocked" ? `blocked, ${span(seconds(c.blocked_until) - counters.at)} left` : state)
				setAttribute(kept.badge, "class", state ? `badge ${state}` : "")
			},
		},
		policyColumn(),
		{
			name: "tokens", label: "Bucket", value: (c) => c.tokens, first: 1,
			make(cell, kept) {
				kept.meter = make("meter", { min: 0 })
				kept.tokens = make("span", { class: "num" })
				cell.append(make("div", { class: "bucket" }, kept.meter, kept.tokens))
			},
			show(_, c, kept) {
				setAttribute(kept.meter, "max", c.burst)
				setAttribute(kept.meter, "low", 1)
				setAttribute(kept.meter, "high", Math.max(1, c.burst / 4))
				setAttribute(kept.meter, "optimum", c.burst)
				setAttribute(kept.meter, "value", Math.round(c.tokens * 100) / 100)
				setAttribute(kept.meter, "aria-label", `Tokens of ${c.client}${inZone(c)}`)
				setText(kept.tokens, `${tokens(c.tokens)} / ${count(c.burst)}`)
			},
		},
		{ name: "rate", label: "Req/s", class: "num mid", show: text((c) => short(clientRates.get(clientKey(c)) ?? 0)) },
		{ name: "requests", label: "Requests", value: (c) => c.requests, class: "num mid", show: text((c) => count(c.requests)) },
		{ name: "rejections", label: "Rejected", value: (c) => c.rejections, class: "num", show: text((c) => count(c.rejections)) },
		{ name: "tunnels", label: "Tunnels", value: (c) => c.tunnels, class: "num mid", show: text((c) => count(c.tunnels)) },
		{ name: "bytes", label: "Traffic", value: (c) => c.bytes_up + c.bytes_down, class: "num mid", show: text((c) => bytesText(c.bytes_up + c.bytes_down)) },
		// Sort in steps of five seconds, so that active rows do not jump around.
		{ name: "last_seen", label: "Last seen", value: (c) => -Math.floor(age(c.last_seen) / 5), class: "num mid soft", show: text((c) => ago(c.last_seen)) },
		{
			name: "do", hidden: "Actions", class: "do",
			make: actionCell(["Refill", (c) => refill(c)], ["Block", (c) => (isBlocked(c) ? unblock(c) : block(c))]),
			show(cell, c, kept) {
				cell.hidden = !canAct
				setText(kept.buttons[1], isBlocked(c) ? "Unblock" : "Block")
				setAttribute(kept.buttons[0], "aria-label", `Refill the bucket of ${c.client}${inZone(c)}`)
				setAttribute(kept.buttons[1], "aria-label", `${isBlocked(c) ? "Unblock" : "Block"} ${c.client}${manyZones ? " in all zones" : ""}`)
			},
		},
	],
})

const who = (t) => (t.user ? `${t.user} @ ${t.client}` : t.client)

const tunnels = new Table("tunnels", {
	key: (t) => String(t.id),
	sort: "started",
	order: 1,
	empty: "No open tunnels.",
	columns: [
		{
			name: "target", label: "Target", value: (t) => t.target, first: 1, class: "grow", make: twoLines,
			show(cell, t, kept) {
				showLines(kept, t.target, who(t) + policyNote(t))
				setAttribute(cell, "title", `${t.target} (${t.address})`)
			},
		},
		{ name: "client", label: "Client", value: (t) => t.client, first: 1, class: "mid", show: text(who) },
		policyColumn(),
		{ name: "proto", label: "Protocol", value: (t) => t.proto, first: 1, class: "soft mid", show: text((t) => t.proto) },
		{ name: "started", label: "Age", value: (t) => age(t.started), first: 1, class: "num", show: text((t) => span(age(t.started))) },
		{ name: "idle", label: "Idle", value: (t) => t.idle_seconds, class: "num mid", show: text((t) => (t.idle_seconds < 1.5 ? "–" : span(t.idle_seconds))) },
		{ name: "up", label: "Up", value: (t) => t.bytes_up, class: "num mid", show: text((t) => bytesText(t.bytes_up)) },
		{ name: "down", label: "Down", value: (t) => t.bytes_down, class: "num mid", show: text((t) => bytesText(t.bytes_down)) },
		{
			name: "do", hidden: "Actions", class: "do", make: actionCell(["Close", (t) => close(t)]),
			show(cell, t, kept) {
				cell.hidden = !canAct
				setAttribute(kept.buttons[0], "aria-label", `Close tunnel ${t.id} to ${t.target}`)
			},
		},
	],
})

const refusals = refusalsTable({ policyColumn, ago })
const targets = targetsTable()

// A snapshot holds only the most recently active clients, tunnels and refusals. When there
// are more, Source asks the server to sort and filter.
class Source {
	constructor(name, query) {
		this.name = name
		this.query = query
		this.asked = null
		this.answer = null
	}

	// list returns the server's last answer, or null if the snapshot is complete enough.
	list() {
		const part = snapshot[this.name]
		const query = part.total > part[this.name].length ? this.query() : null
		if (query == null) {
			this.asked = this.answer = null
			return null
		}
		if (query !== this.asked || performance.now() - this.at > 2000) this.ask(query)
		return this.answer
	}

	async ask(query) {
		this.asked = query
		this.at = performance.now()
		try {
			const response = await fetch(`${this.name}.json?${query}`)
			if (!response.ok) throw new Error((await response.json()).error)
			const answer = await response.json()
			if (this.asked !== query) return
			this.answer = answer
			if (!paused) showTables()
		} catch (error) {
			note(String(error.message ?? error))
		}
	}
}

const words = (id) => $(id).value.trim().toLowerCase()

const clientSource = new Source("clients", () => {
	const q = masked ? "" : words("clients-filter")
	const limited = $("clients-limited").checked
	const policy = $("policy").value
	const remote = ["tokens", "requests", "rejections", "bytes", "tunnels", "last_seen"].includes(clients.sort)
	if (!q && !limited && !policy && (!remote || (clients.sort === "last_seen" && clients.order < 0))) return null
	const query = new URLSearchParams({ limit: 100 })
	if (remote) query.set("sort", clients.sort)
	if (remote) query.set("order", clients.order > 0 ? "asc" : "desc")
	if (q) query.set("q", q)
	if (limited) query.set("limited", "")
	if (policy) query.set("policy", policy)
	return query.toString()
})

const tunnelSource = new Source("tunnels", () => {
	const q = masked ? "" : words("tunnels-filter")
	const policy = $("policy").value
	const sort = { started: "started", idle: "idle" }[tunnels.sort]
	if (!q && !policy && (!sort || (sort === "started" && tunnels.order > 0))) return null
	const query = new URLSearchParams({ limit: 200 })
	if (sort) query.set("sort", sort)
	if (sort) query.set("order", (tunnels.order > 0) === (sort === "idle") ? "asc" : "desc") // the youngest tunnel has the latest start
	if (q) query.set("q", q)
	if (policy) query.set("policy", policy)
	return query.toString()
})

const refusalSource = new Source("refusals", () => refusalsQuery(refusals, masked ? "" : words("refusals-filter"), $("policy").value))

// shown displays how many of the total a table contains.
function shown(id, n, total) {
	setText($(id), n === total ? count(total) : `${count(n)} of ${count(total)}`)
}

function showTables() {
	const fitting = words("clients-filter")
	const limited = $("clients-limited").checked
	listPolicies()
	const policy = $("policy").value
	let list = (clientSource.list() ?? snapshot.clients).clients
	manyZones = new Set([...snapshot.clients.clients, ...list].map((c) => c.zone)).size > 1
	list = list.filter((c) => isOfPolicy(c) && c.client.toLowerCase().includes(fitting) && (!limited || isLimited(c) || isBlocked(c)))
	clients.show(clients.sorted(list), fitting || limited || policy ? "No matching clients." : undefined)
	shown("clients-count", list.length, snapshot.clients.total)

	const like = words("tunnels-filter")
	let open = (tunnelSource.list() ?? snapshot.tunnels).tunnels
	open = open.filter((t) => isOfPolicy(t) && [t.client, t.target, t.user ?? ""].some((part) => part.toLowerCase().includes(like)))
	tunnels.show(tunnels.sorted(open), like || policy ? "No matching tunnels." : undefined)
	shown("tunnels-count", open.length, snapshot.tunnels.total)

	const about = words("refusals-filter")
	let refused = (refusalSource.list() ?? snapshot.refusals).refusals
	refused = refused.filter((r) => isOfPolicy(r) && isAbout(r, about))
	refusals.causes = snapshot.refusals.causes
	refusals.show(refusals.sorted(refused), about || policy ? "No matching refusals." : undefined)
	shown("refusals-count", refused.length, snapshot.refusals.total)

	targets.show(targets.sorted(snapshot.targets.targets))
	shown("targets-count", snapshot.targets.targets.length, snapshot.targets.total)

	for (const table of [clients, tunnels]) table.heads.at(-1).hidden = !canAct
	for (const table of [clients, tunnels, refusals]) {
		table.heads[table.columns.findIndex((column) => column.name === "policy")].hidden = !policies.length
	}
}

for (const table of [clients, tunnels, refusals, targets]) table.onChange = () => snapshot && showTables()
for (const id of ["clients-filter", "clients-limited", "tunnels-filter", "refusals-filter", "policy"]) {
	$(id).addEventListener("input", () => {
		for (const table of [clients, tunnels, refusals]) table.moveNow = true
		if (snapshot) showTables()
	})
}

let settingsShown = ""
function showSettings() {
	const now = JSON.stringify(snapshot.settings)
	if (now === settingsShown) return
	settingsShown = now
	if (!snapshot.settings.length) {
		$("sites").replaceChildren(make("p", { class: "hint" }, "This config has no async_proxy."))
		return
	}
	$("sites").replaceChildren(...snapshot.settings.map(({ site, settings, policies = [] }) => {
		const parts = policies.flatMap(({ policy, settings }) => [make("h4", {}, `policy ${policy}`), settingsList(settings)])
		return make("div", { class: "site" }, make("h3", {}, site), settingsList(settings), ...parts)
	}))
}

function settingsList(settings) {
	const list = make("dl")
	for (const { option, value, default: isDefault } of settings) {
		const dd = make("dd", {}, value)
		if (isDefault) dd.append(make("span", { class: "hidden" }, " (default)"))
		list.append(make("div", isDefault ? { class: "default" } : {}, make("dt", {}, option), dd))
	}
	return list
}

// ---- Actions

async function act(action, fields, done) {
	try {
		const response = await fetch(action, { method: "POST", body: new URLSearchParams(fields) })
		if (!response.ok) throw new Error((await response.json()).error)
		note(done)
	} catch (error) {
		note(String(error.message ?? error))
	}
}

const close = (t) => act("close", { tunnel: t.id }, `Closed the tunnel to ${t.target}.`)
const refill = (c) => act("refill", { client: c.client, zone: c.zone, policy: c.policy ?? ownPolicy }, `${c.client} has a full bucket${inZone(c)}.`)
const unblock = (c) => act("block", { client: c.client, for: "0s" }, `${c.client} is no longer blocked.`)

function block(c) {
	setText($("block-client"), c.client)
	$("block").returnValue = ""
	$("block").onclose = () => {
		const duration = $("block-for")
		if ($("block").returnValue === "block") {
			act("block", { client: c.client, for: duration.value }, `${c.client} is blocked for ${duration.selectedOptions[0].text}.`)
		}
	}
	$("block").showModal()
}

// ---- The connection

function show() {
	const { stats } = snapshot
	setText($("about"), `${stats.version}${stats.commit ? ` (${stats.commit})` : ""} · Caddy ${stats.caddy} · ${stats.go} · up ${span(age(stats.started))}` +
		(seconds(stats.loaded) - seconds(stats.started) > 2 ? ` · config ${span(age(stats.loaded))} old` : ""))
	const h = histogram("dial", RECENT)
	samples.at(-1).p50 = quantile(h, 0.5) ?? undefined
	showWarnings(stats.warnings, seconds(stats.time))
	showTiles(stats)
	for (const chart of charts) chart.update()
	showTables()
	showSettings()
	document.title = `${short(mean("requests", 5))}/s · async_proxy`
}

let connected = false
function showState() {
	const state = !connected ? "reconnecting" : paused ? "paused" : "live"
	setAttribute($("state"), "data-state", state)
	setText($("state"), { live: "Live", paused: "Paused", reconnecting: snapshot ? "Reconnecting" : "Connecting" }[state])
}

let events = null
let lastHeard = 0
let retry = 0

function connect() {
	clearTimeout(retry)
	events?.close()
	lastHeard = performance.now()
	events = new EventSource("events")
	events.addEventListener("hello", (event) => {
		const hello = JSON.parse(event.data)
		if (hello.page !== document.querySelector("meta[name=version]").content) location.reload()
		canAct = hello.actions
		masked = hello.masked
		hour.begin()
	})
	events.addEventListener("history", (event) => hour.receive(JSON.parse(event.data)))
	events.addEventListener("snapshot", (event) => {
		lastHeard = performance.now()
		connected = true
		snapshot = JSON.parse(event.data)
		learn(snapshot)
		if (!paused) show()
		showState()
	})
	events.addEventListener("error", () => {
		connected = false
		showState()
		// The browser retries by itself, except when the response is not an event stream.
		if (events.readyState !== EventSource.CLOSED) return
		retry = setTimeout(connect, 3000)
		refused()
	})
}

// refused shows why the server denied the stream; EventSource hides the response.
async function refused() {
	try {
		const response = await fetch("events", { method: "HEAD" })
		if (!response.ok) note(response.status === 503 ? "Too many viewers; retrying." : `The server responded with status ${response.status}.`)
	} catch {
		// The server is unreachable.
	}
}

// A connection may also die silently.
setInterval(() => {
	if (!events || performance.now() - lastHeard < 4000) return
	connected = false
	showState()
	if (performance.now() - lastHeard > 10000) connect()
}, 1000)

$("pause").addEventListener("click", () => {
	paused = !paused
	setAttribute($("pause"), "aria-pressed", paused)
	showState()
	if (!paused && snapshot) show()
})

// A hidden page disconnects after five minutes, and then costs the server nothing.
let away
document.addEventListener("visibilitychange", () => {
	clearTimeout(away)
	if (document.hidden) {
		away = setTimeout(() => {
			events?.close()
			events = null
		}, SPAN * 1000)
	} else if (!events) {
		connect()
	}
})

connect()
