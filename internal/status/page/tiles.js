// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The tiles: what happens now.

import { $, bytes, count, latency, make, makeSVG, percent, setAttribute, setText, short } from "./base.js"
import { counters, histogram, limitedShare, mean, over, quantile } from "./samples.js"
import { isWrong } from "./warnings.js"

export const RECENT = 60 // seconds that the tiles cover

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

export function showTiles(stats) {
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
