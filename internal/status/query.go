// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"cmp"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// The limits of a query: at most MaxPage elements of a list in one response, after skipping
// at most maxOffset. The search holds limit+offset candidates in memory.
const (
	MaxPage   = 1000
	maxOffset = 10_000
)

// The orders of lists, for messages.
const (
	ClientSorts  = "last_seen, requests, rejections, bytes, tunnels or tokens"
	TunnelSorts  = "started, idle or bytes"
	RefusalSorts = "last, first or count"
)

// SortsClients reports whether clients can be sorted by key, one of ClientSorts.
func SortsClients(key string) bool { return sortsOfClients[key] != nil }

// SortsTunnels reports whether tunnels can be sorted by key, one of TunnelSorts.
func SortsTunnels(key string) bool { return sortsOfTunnels[key] != nil }

// SortsRefusals reports whether refusals can be sorted by key, one of RefusalSorts.
func SortsRefusals(key string) bool { return sortsOfRefusals[key] != nil }

// Clients returns the clients that the parameters of an API request select.
func (v *View) Clients(values url.Values, now time.Time) (ClientList, error) {
	q := clientQuery{limited: values.Has("limited") && values.Get("limited") != "false", match: strings.ToLower(values.Get("q")), policy: v.policyQuery(values.Get("policy"))}
	var err error
	if q.limit, q.offset, q.ascending, err = queryPage(values); err != nil {
		return ClientList{}, err
	}
	if q.key = sortsOfClients[cmp.Or(values.Get("sort"), "last_seen")]; q.key == nil {
		return ClientList{}, fmt.Errorf("sort %q: expected %s", values.Get("sort"), ClientSorts)
	}
	v.query.Lock()
	defer v.query.Unlock()
	return v.findClients(q, now), nil
}

// Tunnels returns the open tunnels that the parameters of an API request select.
func (v *View) Tunnels(values url.Values, now time.Time) (TunnelList, error) {
	q := tunnelQuery{match: strings.ToLower(values.Get("q")), client: strings.ToLower(values.Get("client")), policy: v.policyQuery(values.Get("policy"))}
	var err error
	if q.limit, q.offset, q.ascending, err = queryPage(values); err != nil {
		return TunnelList{}, err
	}
	if q.key = sortsOfTunnels[cmp.Or(values.Get("sort"), "started")]; q.key == nil {
		return TunnelList{}, fmt.Errorf("sort %q: expected %s", values.Get("sort"), TunnelSorts)
	}
	v.query.Lock()
	defer v.query.Unlock()
	return v.findTunnels(q, now), nil
}

// Refusals returns the groups of refusals that the parameters of an API request select.
func (v *View) Refusals(values url.Values) (RefusalList, error) {
	q := refusalQuery{cause: values.Get("cause"), match: strings.ToLower(values.Get("q")), client: strings.ToLower(values.Get("client")), target: strings.ToLower(values.Get("target")), policy: v.policyQuery(values.Get("policy"))}
	var err error
	if q.limit, q.offset, q.ascending, err = queryPage(values); err != nil {
		return RefusalList{}, err
	}
	if q.key = sortsOfRefusals[cmp.Or(values.Get("sort"), "last")]; q.key == nil {
		return RefusalList{}, fmt.Errorf("sort %q: expected %s", values.Get("sort"), RefusalSorts)
	}
	return v.refusals.list(q), nil
}

func queryPage(values url.Values) (limit, offset int, ascending bool, err error) {
	if limit, err = strconv.Atoi(cmp.Or(values.Get("limit"), "100")); err != nil || limit < 1 || limit > MaxPage {
		return 0, 0, false, fmt.Errorf("limit %q: expected a number from 1 to %d", values.Get("limit"), MaxPage)
	}
	if offset, err = strconv.Atoi(cmp.Or(values.Get("offset"), "0")); err != nil || offset < 0 || offset > maxOffset {
		return 0, 0, false, fmt.Errorf("offset %q: expected a number from 0 to %d", values.Get("offset"), maxOffset)
	}
	switch order := values.Get("order"); order {
	case "", "desc":
	case "asc":
		ascending = true
	default:
		return 0, 0, false, fmt.Errorf("order %q: expected asc or desc", order)
	}
	return limit, offset, ascending, nil
}
