// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// What the snapshot does not have.

import { $, note } from "./base.js"
import { state } from "./state.js"

// Source asks the server to sort and filter the rows of a table when there are more than in the
// snapshot, which holds only the most recently active clients, tunnels and refusals. query returns
// what to ask for, or null if the snapshot has the rows that are shown.
export class Source {
	constructor(name, table, query) {
		Object.assign(this, { name, table, query })
		this.asked = null
		this.answer = null
	}

	// list returns the rows to show: the server's last answer, or those of the snapshot if that is
	// complete enough.
	list() {
		const part = state.snapshot[this.name]
		const query = part.total > part[this.name].length ? this.query() : null
		if (query == null) {
			this.asked = this.answer = null
			return part[this.name]
		}
		if (query !== this.asked || performance.now() - this.at > 2000) this.ask(query)
		return (this.answer ?? part)[this.name]
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
			if (!state.paused) this.table.onChange()
		} catch (error) {
			note(String(error.message ?? error))
		}
	}
}

// words returns what the operator has entered in a filter, in lower case.
export const words = (id) => $(id).value.trim().toLowerCase()

// filter returns what to ask the server for by a filter: nothing while clients are masked.
export const filter = (id) => (state.masked ? "" : words(id))
