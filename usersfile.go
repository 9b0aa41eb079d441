// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// usersFile is a provider of the users in a file and of those of basic_auth. It reads the file again
// after a change. If the file then has a mistake, the users stay as they were, and the log says why.
type usersFile struct {
	path    string
	static  []caddyauth.Account // of basic_auth
	hash    anyHash
	realm   string
	ctx     caddy.Context
	logger  *zap.Logger
	users   atomic.Pointer[caddyauth.HTTPBasicAuth]
	checkAt atomic.Int64 // when to check the file for changes again, since epoch

	mu      sync.Mutex  // guards the following
	read    os.FileInfo // of the file when it was last read; nil: it was missing meanwhile
	mistake error       // why users are not those of the file; nil: they are
	release func()      // of users
}

// usersFileInterval is how often the file is checked for changes, while clients send credentials.
const usersFileInterval = time.Second

// maxUsersFile is the maximum size of the file: some hundred thousand users.
const maxUsersFile = 32 << 20

// newUsersFile reads the file. static has the users of basic_auth; it may be nil.
func newUsersFile(ctx caddy.Context, path string, static *caddyauth.HTTPBasicAuth, logger *zap.Logger) (*usersFile, error) {
	u := &usersFile{path: path, ctx: ctx, logger: logger}
	if static != nil {
		u.realm, u.hash.other = static.Realm, static.Hash
		for _, account := range static.Accounts {
			if err := checkAccount(account); err != nil {
				return nil, fmt.Errorf("basic_auth: %w", err)
			}
			u.static = append(u.static, account)
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	u.checkAt.Store(monotime.Of(time.Now().Add(usersFileInterval)))
	if err := u.load(info); err != nil {
		return nil, err
	}
	u.warnIfEmpty()
	return u, nil
}

// current returns the provider of the users as the file now has them.
func (u *usersFile) current() *caddyauth.HTTPBasicAuth {
	now := time.Now()
	if at := u.checkAt.Load(); monotime.Of(now) >= at && u.checkAt.CompareAndSwap(at, monotime.Of(now.Add(usersFileInterval))) {
		u.refresh()
	}
	return u.users.Load()
}

// refresh reads the file again if it has changed.
func (u *usersFile) refresh() {
	u.mu.Lock()
	defer u.mu.Unlock()
	info, err := os.Stat(u.path)
	if err == nil && os.SameFile(info, u.read) && info.ModTime().Equal(u.read.ModTime()) && info.Size() == u.read.Size() {
		return
	}
	if err == nil {
		err = u.load(info)
	} else {
		u.read = nil // the same file may come back
	}
	known := u.mistake
	if u.mistake = err; err != nil {
		if known == nil || known.Error() != err.Error() {
			u.logger.Error("users_file cannot be read; the users stay as they were", zap.String("file", u.path), errorField(err))
		}
		return
	}
	u.logger.Info("users_file has been read again", zap.String("file", u.path), zap.Int("users", len(u.users.Load().Accounts)))
	u.warnIfEmpty()
}

// warnIfEmpty logs that nobody can log in.
func (u *usersFile) warnIfEmpty() {
	if len(u.users.Load().Accounts) == 0 {
		u.logger.Warn("users_file has no users, so every client is refused; add a user to it", zap.String("file", u.path))
	}
}

// warnings returns what is wrong with the file now.
func (u *usersFile) warnings(site string) (found []status.Warning) {
	users := u.current()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.mistake != nil {
		found = append(found, status.Warning{Code: "users_file_mistake", Site: site,
			Text: fmt.Sprintf("the users_file cannot be read, and the users stay as they were: %v", printable.Error(u.mistake))})
	}
	if len(users.Accounts) == 0 {
		found = append(found, status.Warning{Code: "users_file_empty", Site: site,
			Text: fmt.Sprintf("the users_file %s has no users, so every client is refused; add a user to it", u.path)})
	}
	return found
}

// load reads the file. After a mistake it reads it again only once it has changed.
func (u *usersFile) load(info os.FileInfo) error {
	u.read = info
	accounts, err := readUsers(u.path)
	if err != nil {
		return err
	}
	for _, account := range u.static {
		if slices.ContainsFunc(accounts, func(a caddyauth.Account) bool { return a.Username == account.Username }) {
			return fmt.Errorf("%s: the user '%s' is in basic_auth, too; expected each user once", u.path, account.Username)
		}
	}
	ctx, cancel := caddy.NewContext(u.ctx)
	users := &caddyauth.HTTPBasicAuth{AccountList: append(accounts, u.static...), Realm: u.realm}
	if err := users.Provision(ctx); err != nil {
		cancel()
		return err
	}
	users.Hash = u.hash
	hideUnknownUsers(users, caddyauth.BcryptHash{}.FakeHash()) // of the algorithm that it is provisioned with
	u.users.Store(users)
	if u.release != nil {
		u.release()
	}
	u.release = cancel
	return nil
}

// byteOrderMark is what some editors begin a file in UTF-8 with.
const byteOrderMark = "\ufeff"

// readUsers reads a file with a user and a hash on each line, as htpasswd writes it.
func readUsers(path string) (accounts []caddyauth.Account, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxUsersFile {
		return nil, fmt.Errorf("%s has %d bytes; expected at most %d", path, info.Size(), maxUsersFile)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	known := make(map[string]bool)
	n := 0
	for line := range strings.Lines(strings.TrimPrefix(string(text), byteOrderMark)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		account, err := readUser(line)
		if err == nil && known[account.Username] {
			err = fmt.Errorf("the user '%s' is listed twice; expected each user once", account.Username)
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, n, err)
		}
		known[account.Username] = true
		accounts = append(accounts, account)
	}
	return accounts, nil
}

// readUser reads one line. Its errors do not quote the hash, in place of which the line may have a
// password.
func readUser(line string) (account caddyauth.Account, err error) {
	user, hash, found := strings.Cut(line, ":")
	switch algorithm := hashAlgorithm(hash); {
	case !found || user == "":
		err = errors.New("the line is not a user and a hash; expected <user>:<hash>, as htpasswd -B prints it")
	case checkUserName(user) != nil:
		err = checkUserName(user)
	case algorithm == "" || checkHash(algorithm, hash) != nil:
		err = fmt.Errorf("the hash of the user '%s' is not valid; expected one of bcrypt or argon2id, as htpasswd -B or caddy hash-password prints it", user)
	case isPublished(hash):
		err = fmt.Errorf("the user '%s' has %w", user, errPublished)
	}
	return caddyauth.Account{Username: user, Password: hash}, err
}

// hashAlgorithm returns the algorithm of a hash, or "" if it is not known.
func hashAlgorithm(hash string) string {
	switch {
	case strings.HasPrefix(hash, "$2"):
		return "bcrypt"
	case strings.HasPrefix(hash, "$argon2id$"):
		return "argon2id"
	}
	return ""
}

// anyHash compares passwords with hashes of all algorithms that a file may have.
type anyHash struct {
	other caddyauth.Comparer // for the other hashes of basic_auth; nil: there are none
}

// Compare implements caddyauth.Comparer.
func (h anyHash) Compare(hashed, plaintext []byte) (bool, error) {
	switch algorithm := hashAlgorithm(string(hashed)); {
	case algorithm == "argon2id":
		return caddyauth.Argon2idHash{}.Compare(hashed, plaintext)
	case algorithm == "" && h.other != nil:
		return h.other.Compare(hashed, plaintext)
	}
	return caddyauth.BcryptHash{}.Compare(hashed, plaintext)
}

// Authenticate implements caddyauth.Authenticator.
func (u *usersFile) Authenticate(w http.ResponseWriter, r *http.Request) (caddyauth.User, bool, error) {
	return u.current().Authenticate(w, r)
}
