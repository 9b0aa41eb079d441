// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The tables of the status page.

import { $, count, make, setText, setAttribute } from "./base.js"

// Table is a sortable table. It reuses the elements of rows that stay. While the
// pointer or the focus is inside, rows keep their places, so that nothing moves
// under a click. With group, which returns a text, rows with the same text stand
// below a row of their own, in the order of the texts; showGroup shows it, for the
// first of the rows. New rows of groups wait until the pointer has left, unless all
// rows are new.
export class Table {
	constructor(name, { columns, key, classes, sort, order = -1, empty, group, showGroup }) {
		Object.assign(this, { columns, key, classes, empty, sort, order, group, showGroup })
		this.table = $(`${name}-table`)
		this.rows = new Map()
		this.groups = new Map()
		this.body = make("tbody")
		const head = make("tr")
		this.heads = columns.map((column) => {
			const th = make("th", { scope: "col", class: column.class ?? "" })
			if (column.value) {
				const button = make("button", { type: "button" }, column.label)
				button.addEventListener("click", () => this.sortBy(column))
				th.append(button)
			} else {
				th.append(column.label ? column.label : make("span", { class: "hidden" }, column.hidden))
			}
			head.append(th)
			return th
		})
		this.table.append(make("thead", {}, head), this.body)
		this.markSort()
	}

	sortBy(column) {
		if (this.sort === column.name) this.order = -this.order
		else [this.sort, this.order] = [column.name, column.first ?? -1]
		this.markSort()
		this.onSort?.()
		this.moveNow = true
		this.onChange?.()
	}

	markSort() {
		this.columns.forEach((column, i) => {
			setAttribute(this.heads[i], "aria-sort", column.value && column.name === this.sort ? (this.order > 0 ? "ascending" : "descending") : null)
		})
	}

	sorted(list) {
		const column = this.columns.find((c) => c.name === this.sort)
		return list
			.map((row) => [column.value(row), row, this.group?.(row)])
			.sort(([a, x, g], [b, y, h]) => (g < h ? -1 : g > h ? 1 : 0) || this.order * (a < b ? -1 : a > b ? 1 : 0) || this.columns[0].value(x).localeCompare?.(this.columns[0].value(y), "en", { numeric: true }) || 0)
			.map(([, row]) => row)
	}

	show(list, emptyText = this.empty) {
		const still = !this.moveNow && this.rows.size > 0 && (this.body.matches(":hover") || (!this.group && this.body.contains(document.activeElement)))
		this.moveNow = false
		const focus = document.activeElement
		const left = new Set(this.rows.keys())
		const leftGroups = new Set(this.groups.keys())
		const elements = []
		const used = new Map()
		let known = false // some row is there already
		for (const row of list) {
			let key = this.key(row)
			const n = used.get(key) ?? 0 // masked clients may have the same name
			used.set(key, n + 1)
			if (n) key += `#${n}`
			left.delete(key)
			let kept = this.rows.get(key)
			if (!kept) {
				kept = this.makeRow()
				this.rows.set(key, kept)
			}
			known ||= kept.root.isConnected
			kept.row = row
			this.columns.forEach((column, i) => column.show(kept.cells[i], row, kept))
			setAttribute(kept.root, "class", this.classes?.(row) ?? "")
			const group = this.group?.(row)
			if (group != null && leftGroups.delete(group) | !this.groups.has(group)) elements.push(this.groupRow(group, row))
			elements.push(kept.root)
		}
		for (const group of leftGroups) {
			this.groups.get(group).remove()
			this.groups.delete(group)
		}
		for (const key of left) {
			this.rows.get(key).root.remove()
			this.rows.delete(key)
		}
		this.noRow?.remove()
		if (!list.length) {
			this.noRow = make("tr", { class: "empty" }, make("td", { colspan: this.columns.length }, emptyText))
			this.body.append(this.noRow)
		}
		if (still && (known || !this.group)) {
			if (!this.group) for (const e of elements) if (!e.isConnected) this.body.append(e)
		} else {
			let at = this.body.firstElementChild
			for (const e of elements) {
				if (e === at) at = at.nextElementSibling
				else this.body.insertBefore(e, at)
			}
		}
		if (focus !== document.activeElement && focus?.isConnected) focus.focus({ preventScroll: true })
	}

	// groupRow returns the row above a group, whose first row is given.
	groupRow(group, first) {
		let root = this.groups.get(group)
		if (!root) {
			root = make("tr", { class: "group" }, make("th", { colspan: this.columns.length, scope: "colgroup" }))
			this.groups.set(group, root)
		}
		this.showGroup(root.firstElementChild, first)
		return root
	}

	makeRow() {
		const root = make("tr")
		const kept = { root, row: null }
		kept.cells = this.columns.map((column, i) => {
			const cell = make(i === 0 ? "th" : "td", { class: column.class ?? "", ...(i === 0 ? { scope: "row" } : {}) })
			column.make?.(cell, kept)
			root.append(cell)
			return cell
		})
		return kept
	}
}

// text returns a cell renderer that shows the result of a function of the row.
export const text = (write) => (cell, row) => setText(cell, write(row))

// who says whose a row is.
export const who = (row) => (row.user ? `${row.user} @ ${row.client}` : row.client)

// twoLines makes a cell whose second line replaces columns that do not fit.
export function twoLines(cell, kept) {
	kept.lines = [make("div", { class: "line" }), make("div", { class: "line sub" })]
	cell.append(...kept.lines)
}

export function showLines(kept, ...lines) {
	lines.forEach((line, i) => setText(kept.lines[i], line))
}

export function actionCell(...buttons) {
	return (cell, kept) => {
		kept.buttons = buttons.map(([label, act]) => {
			const button = make("button", { type: "button" }, label)
			button.addEventListener("click", () => act(kept.row))
			cell.append(button)
			return button
		})
	}
}

// shown displays how many of the total a table contains.
export function shown(id, n, total) {
	setText($(id), n === total ? count(total) : `${count(n)} of ${count(total)}`)
}
