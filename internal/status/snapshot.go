// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"cmp"
	"slices"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
)

// Snapshot is the state of the process at one moment, as the status page shows it.
type Snapshot struct {
	Stats    Stats       `json:"stats"`
	Clients  ClientList  `json:"clients"`
	Tunnels  TunnelList  `json:"tunnels"`
	Refusals RefusalList `json:"refusals"`
	Targets  TargetList  `json:"targets"`
	Settings []Site      `json:"settings"`
}

// Versions are the versions of the parts of the running binary.
type Versions struct {
	Version string `json:"version"`          // of async_proxy
	Commit  string `json:"commit,omitempty"` // of async_proxy, if it is known
	Caddy   string `json:"caddy"`
	Go      string `json:"go"`
}

// Stats are the counters since the process started.
type Stats struct {
	Versions
	Started  time.Time `json:"started"`
	Loaded   time.Time `json:"loaded"`
	Time     time.Time `json:"time"`
	Requests struct {
		Forwarded   int64 `json:"forwarded"`
		Tunnels     int64 `json:"tunnels"`
		PassedOn    int64 `json:"passed_on"`
		RateLimited int64 `json:"rate_limited"`
		Refused     int64 `json:"refused"`
		Failed      int64 `json:"failed"`

		AuthRequired int64 `json:"auth_required"`
	} `json:"requests"`
	Refusals map[string]int64 `json:"refusals"`
	Causes   map[string]int64 `json:"causes"`
	Clients  struct {
		Tracked int64 `json:"tracked"`
		Limit   int64 `json:"limit"`
		Evicted int64 `json:"evicted"`
	} `json:"clients"`
	Tunnels struct {
		Open      int64 `json:"open"`
		Limit     int64 `json:"limit"`
		Opened    int64 `json:"opened"`
		BytesUp   int64 `json:"bytes_up"`
		BytesDown int64 `json:"bytes_down"`
	} `json:"tunnels"`
	BytesUp   int64 `json:"bytes_up"`
	BytesDown int64 `json:"bytes_down"`
	Dials     struct {
		OK     int64 `json:"ok"`
		Failed int64 `json:"failed"`
	} `json:"dials"`
	DialSeconds      Histogram `json:"dial_seconds"`
	FirstByteSeconds Histogram `json:"first_byte_seconds"`

	Warnings []Warning `json:"warnings"`
}

// Histogram counts durations per bucket, not cumulatively: above the previous bound of
// Buckets and up to this one. The last count is that of all longer durations.
type Histogram struct {
	Buckets []float64 `json:"buckets"`
	Counts  []int64   `json:"counts"`
}

// ClientList is one page of the clients; Total counts them all.
type ClientList struct {
	Clients []Client `json:"clients"`
	Total   int      `json:"total"`
}

// Client describes one bucket, or a client without one, which counts as full.
type Client struct {
	Client       string     `json:"client"`
	Zone         string     `json:"zone"`
	Policy       string     `json:"policy,omitempty"` // "": the directive's own options
	Tokens       float64    `json:"tokens"`
	Burst        int64      `json:"burst"`
	Refill       float64    `json:"refill"`
	Requests     int64      `json:"requests"`
	Rejections   int64      `json:"rejections"`
	BytesUp      int64      `json:"bytes_up"`
	BytesDown    int64      `json:"bytes_down"`
	Tunnels      int64      `json:"tunnels"`
	LastSeen     time.Time  `json:"last_seen,omitzero"` // zero: never
	BlockedUntil *time.Time `json:"blocked_until,omitempty"`
}

// TunnelList is one page of the open tunnels; Total counts them all.
type TunnelList struct {
	Tunnels []Tunnel `json:"tunnels"`
	Total   int      `json:"total"`
}

// Tunnel describes an open tunnel.
type Tunnel struct {
	ID          uint64    `json:"id"`
	Client      string    `json:"client"`
	User        string    `json:"user,omitempty"`
	Policy      string    `json:"policy,omitempty"`
	Target      string    `json:"target"`
	Address     string    `json:"address"`
	Proto       string    `json:"proto"`
	Started     time.Time `json:"started"`
	IdleSeconds float64   `json:"idle_seconds"`
	BytesUp     int64     `json:"bytes_up"`
	BytesDown   int64     `json:"bytes_down"`
}

// Site holds the options of one handler, named as in the Caddyfile.
type Site struct {
	Site     string    `json:"site"`
	Settings []Setting `json:"settings"`
	Policies []Policy  `json:"policies,omitempty"`
}

// Policy holds the conditions of a policy and the options that it sets.
type Policy struct {
	Policy   string    `json:"policy"`
	Settings []Setting `json:"settings"`
}

// Setting is an option in effect.
type Setting struct {
	Option  string `json:"option"`
	Value   string `json:"value"`
	Default bool   `json:"default"`
}

// How many of the most recently active clients, tunnels and groups of refusals a snapshot has, and how
// many targets.
const (
	snapshotClients  = 100
	snapshotTunnels  = 200
	snapshotRefusals = 100
	snapshotTargets  = 20 // by requests, and as many by bytes
)

// Snapshot copies the current state. It does not block requests.
func (v *View) Snapshot(now time.Time) Snapshot {
	s := Snapshot{Stats: v.Stats(now), Settings: append([]Site{}, v.in.Sites()...)}
	s.Clients = v.findClients(clientQuery{limit: snapshotClients, key: sortsOfClients["last_seen"]}, now)
	s.Tunnels = v.findTunnels(tunnelQuery{limit: snapshotTunnels, key: sortsOfTunnels["idle"], ascending: true}, now)
	s.Targets = v.targets.top(snapshotTargets)
	s.Refusals = v.refusals.list(refusalQuery{limit: snapshotRefusals, key: sortsOfRefusals["last"]})
	slices.SortFunc(s.Settings, func(a, b Site) int { return cmp.Compare(a.Site, b.Site) })
	return s
}

// Stats returns the current counters.
func (v *View) Stats(now time.Time) Stats {
	s := v.counted()
	s.Versions, s.Time, s.Started, s.Loaded = v.in.Versions(), now, v.in.Started, v.in.Loaded()
	s.Warnings = v.warnings(&s, now)
	return s
}

// counted returns the counters, without the fields that describe the process.
func (v *View) counted() (s Stats) {
	for t := range v.in.Tables {
		s.Clients.Tracked += int64(t.Len())
		s.Clients.Limit += int64(t.Limits.MaxClients)
	}
	open, limit := v.in.OpenTunnels()
	s.Tunnels.Open, s.Tunnels.Limit = int64(open), int64(limit)
	s.count(v.in.Counters())
	return s
}

// count sets the fields that come from the counters.
func (s *Stats) count(r metrics.Reading) {
	s.Requests.Forwarded = r.Requests[metrics.Forward][metrics.OK]
	s.Requests.Tunnels = r.Requests[metrics.Tunnel][metrics.OK]
	s.Requests.PassedOn = r.Requests[metrics.Other][metrics.OK]
	for _, outcomes := range r.Requests {
		s.Requests.RateLimited += outcomes[metrics.RateLimited]
		s.Requests.Refused += outcomes[metrics.Refused]
		s.Requests.Failed += outcomes[metrics.Failed]
		s.Requests.AuthRequired += outcomes[metrics.AuthRequired]
	}
	s.Refusals, s.Causes = r.Refusals, r.Causes
	s.Clients.Evicted = r.Evictions
	s.Tunnels.Opened = s.Requests.Tunnels
	s.Tunnels.BytesUp, s.Tunnels.BytesDown = r.TunnelBytesUp, r.TunnelBytesDown
	s.BytesUp, s.BytesDown = r.TunnelBytesUp+r.ForwardedBytesUp, r.TunnelBytesDown+r.ForwardedBytesDown
	s.Dials.OK, s.Dials.Failed = r.DialsOK, r.DialsFailed
	s.DialSeconds, s.FirstByteSeconds = Histogram(r.DialSeconds), Histogram(r.ResponseSeconds)
}
