// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// statusActions maps the path of a POST request to its action. An action returns false if
// its tunnel or client no longer exists.
var statusActions = map[string]func(r *http.Request) (done bool, err error){
	"close":  closeAction,
	"refill": refillAction,
	"block":  blockAction,
}

// maxBlock is the longest block that the page can set. Longer ones belong in the config.
const maxBlock = 30 * 24 * time.Hour

func closeAction(r *http.Request) (bool, error) {
	id, err := strconv.ParseUint(r.FormValue("tunnel"), 10, 64)
	if err != nil {
		return false, errors.New("tunnel: expected the number of an open tunnel")
	}
	return closeTunnel(id), nil
}

func refillAction(r *http.Request) (bool, error) {
	key, err := clientToActOn(r.FormValue("client"))
	if err != nil {
		return false, err
	}
	return refillClient(key, r.FormValue("zone")), nil
}

func blockAction(r *http.Request) (bool, error) {
	key, err := clientToActOn(r.FormValue("client"))
	if err != nil {
		return false, err
	}
	d, err := caddy.ParseDuration(r.FormValue("for"))
	if err != nil || d < 0 || d > maxBlock {
		return false, errors.New("for: expected a duration up to 30d such as 10m, or 0s to end a block")
	}
	return blockClient(key, d), nil
}

// crossOrigin rejects requests that a browser sends on behalf of another origin.
var crossOrigin = http.NewCrossOriginProtection()

// act performs an action of an operator.
func (s *Status) act(w http.ResponseWriter, r *http.Request, name string) {
	action, ok := statusActions[name]
	switch {
	case !ok:
		statusError(w, http.StatusNotFound, "There is no such action; expected close, refill or block.")
		return
	case !s.Actions:
		statusError(w, http.StatusForbidden, "Actions are off; enable them with the option actions of async_proxy_status.")
		return
	case crossOrigin.Check(r) != nil:
		statusError(w, http.StatusForbidden, "Actions may only come from the status page itself; this request comes from another origin.")
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, 4<<10)
	done, err := action(r)
	if err != nil {
		statusError(w, http.StatusBadRequest, err.Error())
		return
	}
	if c := s.logger.Check(zap.InfoLevel, "operator's action"); c != nil {
		by, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
		c.Write(
			zap.String("action", name),
			textField("tunnel", r.FormValue("tunnel")),
			textField("client", r.FormValue("client")),
			textField("zone", r.FormValue("zone")),
			textField("for", r.FormValue("for")),
			zap.Bool("done", done),
			zap.String("by", by),
		)
	}
	if !done {
		statusError(w, http.StatusNotFound, "It no longer exists.")
		return
	}
	statusJSON(w, http.StatusOK, map[string]bool{"done": true})
}
