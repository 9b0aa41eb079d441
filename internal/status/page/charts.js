// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The charts of the last five minutes or the last hour.

/* global uPlot */

import { $, bytesText, clock, count, latency, make, makeSVG, percent, setAttribute, setText, short } from "./base.js"
import * as hour from "./history.js"
import { SPAN, counters, histogram, outcomes, quantile, samples } from "./samples.js"
import { state } from "./state.js"

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
		const histograms = this.series.map(([name]) => (hour.isHour() && state.snapshot ? hour.hourOf(name, samples.at(-1)[name]) : histogram(name, SPAN)))
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

// updateCharts shows the latest samples.
export function updateCharts() {
	for (const chart of charts) chart.update()
}

hour.onSpan(() => charts.forEach((chart) => (chart.build ? chart.build() : chart.update())))
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((c) => c.build?.()))
