// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/load"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/peer"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/report"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/wire"
)

// scenario is one kind of work, for the peers that have one of the abilities.
type scenario struct {
	report.Scenario
	needs peer.Ability
	load  load.Load // without a duration
}

// scenarios are all scenarios in the order of the tables.
func scenarios() []scenario {
	const plain = peer.Forwarding | peer.Reversing
	get := func(id, title, path string, clients, length int) scenario {
		return scenario{
			Scenario: report.Scenario{ID: id, Title: title, Unit: report.PerOperation, Own: "async_proxy"},
			needs:    plain,
			load:     load.Load{Clients: clients, Path: path, Status: 200, Want: wire.Content(length)},
		}
	}
	small := get("get-128", "GET of 128 bytes", "/128", 32, 128)
	small.Details = "32 clients, which keep their connections."
	small.Brief, small.WithLogs = true, true
	medium := get("get-10k", "GET of 10 KiB", "/10240", 32, 10<<10)
	medium.Details = small.Details
	large := get("get-1m", "GET of 1 MiB", "/1048576", 8, 1<<20)
	large.Brief = true
	large.Details = "8 clients, which keep their connections."
	post := get("post-1k", "POST of 1 KiB", "/128", 32, 128)
	post.Brief = true
	post.Details = "32 clients, which keep their connections. Each answer has 128 bytes."
	post.load.Content = 1 << 10
	upload := get("post-64k", "POST of 64 KiB", "/128", 16, 128)
	upload.Details = "16 clients, which keep their connections. Each answer has 128 bytes."
	upload.load.Content = 64 << 10
	fresh := get("new", "GET of 128 bytes, each over a new connection", "/128", 16, 128)
	fresh.Brief = true
	fresh.Details = "16 clients. Peers may keep their connections to the origin."
	fresh.load.Kind = load.Connections
	return append([]scenario{small, medium, large, post, upload, fresh}, tunnelScenarios()...)
}

func tunnelScenarios() []scenario {
	tunnels := func(id, title, details string, unit report.Unit, kind load.Kind, clients int) scenario {
		return scenario{
			Scenario: report.Scenario{ID: id, Title: title, Details: details, Unit: unit, Own: "async_proxy"},
			needs:    peer.Tunnelling,
			load:     load.Load{Kind: kind, Clients: clients},
		}
	}
	connect := tunnels("connect", "CONNECT, opened and closed", "16 clients. Each closes its tunnel as soon as it is open.",
		report.PerOperation, load.Connects, 16)
	down := tunnels("down", "tunnels in bulk, to the client, per GB", "4 tunnels.", report.PerGigabyte, load.Download, 4)
	up := tunnels("up", "tunnels in bulk, to the origin, per GB", "4 tunnels.", report.PerGigabyte, load.Upload, 4)
	kept := tunnels(idle, "idle tunnels", "Each has carried one byte to the origin and back. The figures are what the tunnels add "+
		"to a peer that has just started and had a few before.", report.PerTunnel, load.Connects, 0)
	connect.Brief, down.Brief, kept.Brief = true, true, true
	return []scenario{
		connect, down, up, kept,
		{
			Scenario: report.Scenario{
				ID: "429", Title: "429", Details: "32 clients, which keep their connections and share a limit that is used up.",
				Unit: report.PerOperation, Own: "limited", Reference: "respond",
			},
			needs: peer.Refusing,
			load:  load.Load{Clients: 32, Path: "/128", Status: 429, AnyBytes: true},
		},
	}
}

// idle is the scenario that is measured in another way than all others.
const idle = "idle"
