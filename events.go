// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// eventLimited is the event for a client that is rate limited, for handlers of Caddy's
// events app. A client causes at most one per eventInterval, unless the limiter forgets it
// early.
const (
	eventLimited  = "rate_limited"
	eventInterval = time.Minute
)

// emitter emits the events of one handler.
type emitter struct {
	ctx caddy.Context
	app *caddyevents.App
}

func newEmitter(ctx caddy.Context) (emitter, error) {
	app, err := ctx.App("events")
	if err != nil {
		return emitter{}, err
	}
	return emitter{ctx, app.(*caddyevents.App)}, nil
}

// emitRateLimited emits the event that the client of v is rate limited. It returns when all
// handlers of the event have returned.
func (e emitter) emitRateLimited(zone string, v *transaction, verdict bucket.Decision) {
	if !e.app.ShouldEmit(eventLimited) {
		return
	}
	e.app.Emit(e.ctx, eventLimited, map[string]any{
		"client":      v.name,
		"user":        printable.Text(v.user),
		"zone":        zone,
		"policy":      v.policy.name,
		"host":        printable.Text(v.r.Host),
		"retry_after": ceilSeconds(verdict.Wait),
		"cause":       string(v.cause),
	})
}
